"""The bytes of a response: its object, and the typed events of its stream.

Owns the events' names, order and numbers. A stream's events are numbered from 0 without a gap, so that a
client can ask for those behind the last one it saw. Items open and close one after the other. The response
object in the last event is the one that is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from graphllm.errors import GraphLLMError
from graphllm.outputs import TokenLogprob
from graphllm.server import sse
from graphllm.server.generation.logprobs import chat_logprobs
from graphllm.server.generation.wire import Choice, ChunkExtras, ToolCall, Usage, Wire
from graphllm.server.openai.responses.envelope import Envelope, ResponseStatus
from graphllm.server.openai.responses.output_items import ItemKind, OutputItem, items_of_choice
from graphllm.server.openai.responses.store import body_with_output
from graphllm.tokenizer.tokenizer import Tokenizer

# Called with the response object's head and its output, at the end of a response.
Recorder = Callable[[bytes, bytes], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseOptions:
    """logprobs: whether the text's tokens come with them. is_summarized: reasoning is sent as summary."""

    logprobs: bool = False
    is_summarized: bool = False


class ResponsesWire(Wire):
    """One response. record: where its final state goes; None where nothing is stored."""

    def __init__(
        self,
        response_id: str,
        envelope: Envelope,
        *,
        tokenizer: Tokenizer,
        options: ResponseOptions,
        record: Recorder | None,
    ) -> None:
        super().__init__(response_id)
        self.wants_logprobs = options.logprobs
        self._envelope = envelope
        self._tokenizer = tokenizer
        self._options = options
        self._record = record
        self._num_events = 0
        # In JSON, those that have ended.
        self._items: list[dict[str, Any]] = []
        self._open: OutputItem | None = None
        self._delta_prefix = b""

    def new_call_id(self) -> str:
        return f"call_{uuid4().hex[:24]}"

    # Streams.

    def begin(self, usage: Usage) -> bytes:
        body = body_with_output(self._envelope.head(ResponseStatus.IN_PROGRESS), b"[]")
        return self._response_event("response.created", body) + self._response_event(
            "response.in_progress", body
        )

    def opening(self, choice: Choice) -> bytes:
        return b""

    def text(self, choice: Choice, text: str, *, extras: ChunkExtras | None) -> bytes:
        opened = self._open_item(ItemKind.MESSAGE)
        logprobs = self._new_logprobs(extras)
        return opened + self._delta(text, logprobs=logprobs)

    def reasoning(self, choice: Choice, text: str, *, extras: ChunkExtras | None) -> bytes:
        return self._open_item(ItemKind.REASONING) + self._delta(text)

    def tool_call_start(self, choice: Choice, call: ToolCall, *, extras: ChunkExtras | None) -> bytes:
        return self._open_item(ItemKind.CALL, call=call)

    def tool_call_arguments(
        self, choice: Choice, call: ToolCall, text: str, *, extras: ChunkExtras | None
    ) -> bytes:
        return self._delta(text)

    def tool_call_end(self, choice: Choice, call: ToolCall) -> bytes:
        return self._close_item()

    def closing(self, choice: Choice, *, extras: ChunkExtras | None) -> bytes:
        status = ResponseStatus.of(choice.finish_reason)
        frames = b""
        if self._open is None and not self._items and status is ResponseStatus.COMPLETED:
            frames = self._open_item(ItemKind.MESSAGE)  # an answer without a word is an answer
        if self._open is not None and self._open.kind is ItemKind.MESSAGE:
            self._new_logprobs(extras)  # of the end-of-text token
        return frames + self._close_item(status)

    def end(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        status = ResponseStatus.of(choices[0].finish_reason)
        return self._response_event(f"response.{status}", self._finish(status, self._items, usage=usage))

    def failure(self, error: GraphLLMError) -> bytes:
        frames = self._close_item(ResponseStatus.INCOMPLETE)
        body = self._finish(ResponseStatus.FAILED, self._items, error=error)
        return frames + self._response_event("response.failed", body)

    def cancelled(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """The end of a response that was cancelled, with what there was of it.

        The API has no event of its own for it: an incomplete response whose status says cancelled.
        """
        frames = self._close_item(ResponseStatus.INCOMPLETE)
        items = self._items or self._items_of(choices[0], ResponseStatus.INCOMPLETE, usage)
        body = self._finish(ResponseStatus.CANCELLED, items, usage=usage)
        return frames + self._response_event("response.incomplete", body)

    # Whole answers.

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        status = ResponseStatus.of(choices[0].finish_reason)
        return self._finish(status, self._items_of(choices[0], status, usage), usage=usage)

    def _items_of(self, choice: Choice, status: ResponseStatus, usage: Usage) -> list[dict[str, Any]]:
        logprobs = None
        if self._options.logprobs:
            # Those of the text: what was thought before it comes first.
            logprobs = chat_logprobs(self._tokenizer, choice.logprobs[usage.reasoning_tokens :])
        return items_of_choice(
            choice,
            logprobs=logprobs,
            is_summarized=self._options.is_summarized,
            is_cut=status is ResponseStatus.INCOMPLETE,
        )

    def _finish(
        self,
        status: ResponseStatus,
        items: list[dict[str, Any]],
        *,
        usage: Usage | None = None,
        error: GraphLLMError | None = None,
    ) -> bytes:
        head, output = self._envelope.head(status, usage=usage, error=error), sse.encode_json(items)
        if self._record is not None:
            self._record(head, output)
        return body_with_output(head, output)

    # Items in a stream.

    def _open_item(self, kind: ItemKind, *, call: ToolCall | None = None) -> bytes:
        """Events that make an item of this kind the open one; none where it is already."""
        if call is None and self._open is not None and self._open.kind is kind:
            return b""
        frames = self._close_item()
        item = self._open = OutputItem(
            kind=kind,
            index=len(self._items),
            call_id="" if call is None else call.call_id,
            name="" if call is None else call.name,
            is_summarized=self._options.is_summarized,
            logprobs=[] if self._options.logprobs and kind is ItemKind.MESSAGE else None,
        )
        frames += self._event(
            "response.output_item.added",
            {"output_index": item.index, "item": item.as_json(ResponseStatus.IN_PROGRESS)},
        )
        if kind is not ItemKind.CALL:
            frames += self._part_event("added", item)
        event = f"{self._text_event(item)}.delta"
        place = sse.encode_json({"type": event, **self._place(item)})
        self._delta_prefix = b"event: %b\ndata: %b" % (event.encode(), place[:-1])
        return frames

    def _delta(self, text: str, *, logprobs: list[dict[str, Any]] | None = None) -> bytes:
        item = self._open
        if item is None:
            return b""  # arguments of a call that has ended
        item.pieces.append(text)
        number = self._next_number()
        middle = b""
        if item.kind is ItemKind.MESSAGE:
            middle = b',"logprobs":%b' % (sse.encode_json(logprobs) if logprobs else b"[]")
        return b'%b%b,"sequence_number":%d,"delta":%b}\n\n' % (
            self._delta_prefix,
            middle,
            number,
            sse.encode_text(text),
        )

    def _close_item(self, status: ResponseStatus = ResponseStatus.COMPLETED) -> bytes:
        item, self._open = self._open, None
        if item is None:
            return b""
        whole: dict[str, Any] = {("arguments" if item.kind is ItemKind.CALL else "text"): item.text}
        if item.kind is ItemKind.MESSAGE:
            whole["logprobs"] = item.logprobs or []
        frames = self._event(f"{self._text_event(item)}.done", {**self._place(item), **whole})
        if item.kind is not ItemKind.CALL:
            frames += self._part_event("done", item)
        ended = item.as_json(status)
        self._items.append(ended)
        return frames + self._event("response.output_item.done", {"output_index": item.index, "item": ended})

    def _new_logprobs(self, extras: ChunkExtras | None) -> list[dict[str, Any]] | None:
        """The entries of the tokens since the last frame, kept for the events that repeat the text."""
        logprobs: list[TokenLogprob] | None = extras.logprobs if extras is not None else None
        if not logprobs or self._open is None or self._open.logprobs is None:
            return None
        entries = chat_logprobs(self._tokenizer, logprobs)
        self._open.logprobs += entries
        return entries

    def _is_summary(self, item: OutputItem) -> bool:
        return item.kind is ItemKind.REASONING and item.is_summarized

    def _text_event(self, item: OutputItem) -> str:
        match item.kind:
            case ItemKind.MESSAGE:
                return "response.output_text"
            case ItemKind.CALL:
                return "response.function_call_arguments"
            case ItemKind.REASONING:
                return "response.reasoning_summary_text" if item.is_summarized else "response.reasoning_text"

    def _place(self, item: OutputItem) -> dict[str, Any]:
        place: dict[str, Any] = {"item_id": item.item_id, "output_index": item.index}
        if item.kind is not ItemKind.CALL:
            place["summary_index" if self._is_summary(item) else "content_index"] = 0
        return place

    def _part_event(self, what: str, item: OutputItem) -> bytes:
        name = "reasoning_summary_part" if self._is_summary(item) else "content_part"
        return self._event(f"response.{name}.{what}", {**self._place(item), "part": item.part})

    # Events.

    def _event(self, name: str, members: dict[str, Any]) -> bytes:
        payload = {"type": name, "sequence_number": self._next_number(), **members}
        return sse.named_frame(name, sse.encode_json(payload))

    def _response_event(self, name: str, body: bytes) -> bytes:
        data = b'{"type":"%b","sequence_number":%d,"response":%b}' % (
            name.encode(),
            self._next_number(),
            body,
        )
        return sse.named_frame(name, data)

    def _next_number(self) -> int:
        number = self._num_events
        self._num_events += 1
        return number
