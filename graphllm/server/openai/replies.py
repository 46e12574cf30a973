"""One HTTP answer fed by one or more engine requests: streamed, or collected and sent whole.

A reply is called by the engine at the end of a step, straight on the event loop: `write` frames a
delta, `flush` writes the connection once. No task and no queue stands between. It owns the request
ids behind the answer, the usage counts, and what happens when either side gives up: a client that
goes away aborts its requests; a request that fails ends the answer as an error, never as a clean end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import orjson

from graphllm.errors import EngineUnavailableError, GraphLLMError
from graphllm.outputs import FinishReason, SequenceDelta, TokenLogprob
from graphllm.sampling_params import SamplingParams
from graphllm.server import sse
from graphllm.server.error_responses import send_error
from graphllm.server.http import Request, Response
from graphllm.server.openai.wire import Choice, Usage, Wire


class RequestEngine(Protocol):
    """What a reply needs of the engine."""

    def add(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        *,
        params: SamplingParams,
        sink: PromptSink,
        cache_salt: str | None,
    ) -> None: ...

    def abort(self, request_id: str) -> None: ...


class PromptSink:
    """The engine's view of a reply: one prompt's sequences, renumbered among all choices."""

    __slots__ = ("_first_choice", "_reply", "num_cached_tokens")

    def __init__(self, reply: Reply, first_choice: int) -> None:
        self._reply = reply
        self._first_choice = first_choice
        self.num_cached_tokens = 0

    def write(self, delta: SequenceDelta) -> None:
        self.num_cached_tokens = delta.num_cached_tokens
        self._reply.write(self._first_choice + delta.index, delta)

    def flush(self) -> None:
        self._reply.flush()

    def finish(self) -> None:
        self._reply.finish_prompt()

    def fail(self, error: GraphLLMError) -> None:
        self._reply.fail(error)


class Reply(ABC):
    """What streamed and whole answers have in common."""

    def __init__(self, engine: RequestEngine, wire: Wire, *, request: Request, response: Response) -> None:
        self._engine = engine
        self._wire = wire
        self._request = request
        self._response = response
        self._request_ids: list[str] = []
        self._sinks: list[PromptSink] = []
        self._num_unfinished_prompts = 0
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._is_open = True
        # openai-python shows it as `_request_id`.
        self._headers = (("x-request-id", wire.reply_id),)

    def submit(
        self, prompts: list[list[int]], params: SamplingParams, *, cache_salt: str | None = None
    ) -> None:
        """Hand every prompt to the engine, or none: raises what `Engine.add` raises."""
        if self._request.disconnected:
            return
        self._request.on_disconnect = self.abandon
        self._num_unfinished_prompts = len(prompts)
        self._prompt_tokens = sum(map(len, prompts))
        for position, prompt_token_ids in enumerate(prompts):
            request_id = self._wire.reply_id if len(prompts) == 1 else f"{self._wire.reply_id}-{position}"
            sink = PromptSink(self, position * params.n)
            self._sinks.append(sink)
            try:
                self._engine.add(
                    request_id, prompt_token_ids, params=params, sink=sink, cache_salt=cache_salt
                )
            except GraphLLMError:
                self.abandon()
                raise
            self._request_ids.append(request_id)

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            cached_tokens=sum(sink.num_cached_tokens for sink in self._sinks),
        )

    def abandon(self) -> None:
        """Nobody waits for the answer any more: stop generating it."""
        if not self._is_open:
            return
        self._is_open = False
        for request_id in self._request_ids:
            self._engine.abort(request_id)

    def fail(self, error: GraphLLMError) -> None:
        """One of the requests died, and with it the answer."""
        if not self._is_open:
            return
        self.abandon()
        self._send_failure(error)

    def write(self, choice_index: int, delta: SequenceDelta) -> None:
        if not self._is_open:
            return
        self._completion_tokens += len(delta.token_ids)
        if delta.finish_reason is FinishReason.ABORT:
            self.fail(EngineUnavailableError("The request was cut short by the server."))
            return
        self._write_choice(choice_index, delta)

    def finish_prompt(self) -> None:
        self._num_unfinished_prompts -= 1
        if self._num_unfinished_prompts == 0 and self._is_open:
            self._is_open = False
            self._complete()

    @abstractmethod
    def flush(self) -> None: ...

    @abstractmethod
    def _write_choice(self, choice_index: int, delta: SequenceDelta) -> None: ...

    @abstractmethod
    def _complete(self) -> None: ...

    @abstractmethod
    def _send_failure(self, error: GraphLLMError) -> None: ...


class StreamedReply(Reply):
    """Server-sent events, one write to the connection a step.

    The status line waits for the first token, so that a request that fails before it gets a proper
    status. Text that the detokenizer holds back costs no chunk; its log probabilities wait for the
    chunk that carries the text.
    """

    def __init__(
        self,
        engine: RequestEngine,
        wire: Wire,
        *,
        request: Request,
        response: Response,
        include_usage: bool,
    ) -> None:
        super().__init__(engine, wire, request=request, response=response)
        self._include_usage = include_usage
        self._is_started = False
        self._frames: list[bytes] = []
        self._opened: set[int] = set()
        self._num_closed = 0
        self._waiting_logprobs: dict[int, list[TokenLogprob]] = {}

    def _write_choice(self, choice_index: int, delta: SequenceDelta) -> None:
        if choice_index not in self._opened:
            self._opened.add(choice_index)
            self._frames.append(self._wire.opening(choice_index))
        logprobs: list[TokenLogprob] = []
        if delta.logprobs is not None:
            logprobs = self._waiting_logprobs.setdefault(choice_index, [])
            logprobs.extend(delta.logprobs)
        if delta.text:
            self._frames.append(self._wire.text(choice_index, delta.text, logprobs=logprobs))
            logprobs.clear()
        if delta.finish_reason is not None:
            self._num_closed += 1
            self._frames.append(
                self._wire.closing(
                    choice_index, delta.finish_reason, stop_reason=delta.stop_reason, logprobs=logprobs
                )
            )
            logprobs.clear()

    def flush(self) -> None:
        if not self._is_open or not self._frames:
            return
        data = b"".join(self._frames)
        self._frames.clear()
        if data:
            self._start()
            self._response.write_chunk(data)

    def _complete(self) -> None:
        if self._include_usage:
            self._frames.append(self._wire.usage(self.usage()))
        self._frames.append(sse.DONE)
        self._start()
        self._response.end_stream(b"".join(self._frames))
        self._frames.clear()

    def _send_failure(self, error: GraphLLMError) -> None:
        if not self._is_started:
            send_error(self._response, error)
            return
        # Cutting the connection after the event is what keeps a client that does not read error
        # events from taking half an answer for a whole one.
        self._response.write_chunk(b"".join(self._frames) + sse.frame(orjson.dumps(error.body())))
        self._response.abort_stream()

    def _start(self) -> None:
        if not self._is_started:
            self._is_started = True
            self._response.start_stream(content_type=sse.CONTENT_TYPE, headers=self._headers)


class WholeReply(Reply):
    """Collects every choice and sends one JSON body when the last sequence has ended."""

    def __init__(
        self,
        engine: RequestEngine,
        wire: Wire,
        *,
        request: Request,
        response: Response,
        num_choices: int,
    ) -> None:
        super().__init__(engine, wire, request=request, response=response)
        self._choices = [Choice(index) for index in range(num_choices)]

    def _write_choice(self, choice_index: int, delta: SequenceDelta) -> None:
        choice = self._choices[choice_index]
        if delta.text:
            choice.text.append(delta.text)
        if delta.logprobs is not None:
            choice.logprobs.extend(delta.logprobs)
        if delta.finish_reason is not None:
            choice.finish_reason = delta.finish_reason
            choice.stop_reason = delta.stop_reason

    def flush(self) -> None:
        """Nothing leaves before the end."""

    def _complete(self) -> None:
        body = self._wire.whole(self._choices, self.usage())
        self._response.send(200, body, headers=self._headers)

    def _send_failure(self, error: GraphLLMError) -> None:
        send_error(self._response, error)
