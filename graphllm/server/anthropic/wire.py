"""The bytes of a message: its object, and the events of its stream.

Owns the events' names and order: the message starts, blocks open and close one after the other, and the
message ends with why it stopped and what it took.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from uuid import uuid4

import msgspec

from graphllm.errors import GraphLLMError
from graphllm.outputs import FinishReason
from graphllm.server import sse
from graphllm.server.anthropic.errors import error_body
from graphllm.server.generation.request import RequestWarning
from graphllm.server.generation.wire import Choice, ChunkExtras, ToolCall, Usage, Wire

_PING = sse.named_frame("ping", b'{"type":"ping"}')
_STOP = sse.named_frame("message_stop", b'{"type":"message_stop"}')


class BlockKind(StrEnum):
    THINKING = "thinking"
    TEXT = "text"
    TOOL_USE = "tool_use"


_DELTAS = {
    BlockKind.THINKING: ("thinking_delta", "thinking"),
    BlockKind.TEXT: ("text_delta", "text"),
    BlockKind.TOOL_USE: ("input_json_delta", "partial_json"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageOptions:
    """stop_sequences: the client's. hides_thinking: blocks of thinking come without their text.

    is_clamped: the context left less room than the client's max_tokens.
    """

    model: str
    stop_sequences: tuple[str, ...] = ()
    hides_thinking: bool = False
    is_clamped: bool = False
    warnings: tuple[RequestWarning, ...] = ()


class MessagesWire(Wire):
    """One message."""

    def __init__(self, options: MessageOptions) -> None:
        super().__init__(f"msg_{uuid4().hex}")
        self._options = options
        self._open: BlockKind | None = None
        self._num_blocks = 0
        self._template = sse.ChunkTemplate(b"", b"")
        self._thinking = hashlib.sha256()

    def new_call_id(self) -> str:
        return f"toolu_{uuid4().hex[:24]}"

    # Streams.

    def begin(self, usage: Usage) -> bytes:
        message = self._message([], usage, stop=(None, None))
        return _event("message_start", {"message": message}) + _PING

    def opening(self, choice: Choice) -> bytes:
        return b""

    def text(self, choice: Choice, text: str, *, extras: ChunkExtras | None) -> bytes:
        return self._open_block(BlockKind.TEXT, {"text": ""}) + self._template.render(text)

    def reasoning(self, choice: Choice, text: str, *, extras: ChunkExtras | None) -> bytes:
        frames = self._open_block(BlockKind.THINKING, {"thinking": "", "signature": ""})
        self._thinking.update(text.encode("utf-8", "replace"))
        return frames if self._options.hides_thinking else frames + self._template.render(text)

    def tool_call_start(self, choice: Choice, call: ToolCall, *, extras: ChunkExtras | None) -> bytes:
        closed = self._close_block()
        return closed + self._open_block(
            BlockKind.TOOL_USE, {"id": call.call_id, "name": call.name, "input": {}}
        )

    def tool_call_arguments(
        self, choice: Choice, call: ToolCall, text: str, *, extras: ChunkExtras | None
    ) -> bytes:
        return self._template.render(text)

    def tool_call_end(self, choice: Choice, call: ToolCall) -> bytes:
        return self._close_block()

    def closing(self, choice: Choice, *, extras: ChunkExtras | None) -> bytes:
        return self._close_block()

    def end(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        reason, sequence = self._stop(choices[0])
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return _event("message_delta", {"delta": delta, "usage": _usage_as_json(usage)}) + _STOP

    def failure(self, error: GraphLLMError) -> bytes:
        return sse.named_frame("error", sse.encode_json(error_body(error)))

    # Whole answers.

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        (choice,) = choices
        content: list[dict[str, Any]] = []
        if choice.reasoning:
            thinking = "".join(choice.reasoning)
            self._thinking.update(thinking.encode("utf-8", "replace"))
            shown = "" if self._options.hides_thinking else thinking
            content.append({"type": "thinking", "thinking": shown, "signature": self._signature()})
        if choice.text:
            content.append({"type": "text", "text": "".join(choice.text)})
        content += [
            {"type": "tool_use", "id": call.call_id, "name": call.name, "input": _input(call)}
            for call in choice.tool_calls
        ]
        return sse.encode_json(self._message(content, usage, stop=self._stop(choice)))

    def _message(
        self, content: list[dict[str, Any]], usage: Usage, *, stop: tuple[str | None, str | None]
    ) -> dict[str, Any]:
        reason, sequence = stop
        message = {
            "id": self.reply_id,
            "type": "message",
            "role": "assistant",
            "model": self._options.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": _usage_as_json(usage),
        }
        if self._options.warnings:
            message["warnings"] = [warning.as_json() for warning in self._options.warnings]
        return message

    def _stop(self, choice: Choice) -> tuple[str, str | None]:
        """(stop_reason, stop_sequence)"""
        if choice.finish_reason is FinishReason.LENGTH:
            return ("model_context_window_exceeded" if self._options.is_clamped else "max_tokens"), None
        if choice.stop_reason in self._options.stop_sequences:
            assert isinstance(choice.stop_reason, str)
            return "stop_sequence", choice.stop_reason
        return ("tool_use" if choice.called_tools else "end_turn"), None

    # Blocks in a stream.

    def _open_block(self, kind: BlockKind, members: dict[str, Any]) -> bytes:
        """Events that make a block of this kind the open one; none where it is already."""
        if self._open is kind:
            return b""
        frames = self._close_block()
        self._open = kind
        block = {"index": self._num_blocks, "content_block": {"type": kind, **members}}
        delta_type, name = _DELTAS[kind]
        prefix = b'{"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":' % (
            self._num_blocks,
            delta_type.encode(),
            name.encode(),
        )
        self._template = sse.ChunkTemplate(b"event: content_block_delta\ndata: " + prefix, b"}}\n\n")
        return frames + _event("content_block_start", block)

    def _close_block(self) -> bytes:
        if self._open is None:
            return b""
        kind, self._open = self._open, None
        frames, index = b"", self._num_blocks
        if kind is BlockKind.THINKING:
            delta = {"type": "signature_delta", "signature": self._signature()}
            frames = _event("content_block_delta", {"index": index, "delta": delta})
        self._num_blocks += 1
        return frames + _event("content_block_stop", {"index": index})

    def _signature(self) -> str:
        """Clients expect one, and send it back. It names the thinking's text and proves nothing."""
        return self._thinking.hexdigest()


def _event(name: str, members: dict[str, Any]) -> bytes:
    return sse.named_frame(name, sse.encode_json({"type": name, **members}))


def _usage_as_json(usage: Usage) -> dict[str, Any]:
    """As Anthropic counts: what was read from the cache is not part of input_tokens."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }


def _input(call: ToolCall) -> dict[str, Any]:
    """The call's arguments; empty where the model was cut before they were whole (stop_reason says so)."""
    try:
        return msgspec.json.decode(call.arguments_json, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        return {}
