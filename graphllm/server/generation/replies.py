"""One HTTP answer fed by one or more engine requests: streamed, or collected and sent whole.

A reply is called by the engine at the end of a step, straight on the event loop: `write` frames a
delta, `flush` writes the connection once. No task and no queue stands between. It owns the request
ids behind the answer, the usage counts, and what happens when either side gives up: a client that
goes away aborts its requests; a request that fails ends the answer as an error, never as a clean end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol

from graphllm.errors import EngineUnavailableError, GraphLLMError, InvalidRequestError
from graphllm.outputs import FinishReason, SequenceDelta
from graphllm.sampling_params import SamplingParams
from graphllm.server import sse
from graphllm.server.error_responses import send_error
from graphllm.server.generation.choices import ChoiceReader, Piece
from graphllm.server.generation.fields import renamed
from graphllm.server.generation.framing import ReplyFramer
from graphllm.server.generation.request import GenerationRequest
from graphllm.server.generation.wire import Choice, Usage, Wire
from graphllm.server.http import Request, Response

logger = logging.getLogger(__name__)

# How long an answer may be put together before the loop gets its turn.
_SLICE_SECONDS = 0.001


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
        priority: int,
        lora: str | None,
    ) -> None: ...

    def abort(self, request_id: str) -> None: ...


class PromptSink:
    """The engine's view of a reply: one prompt's sequences, renumbered among all choices."""

    __slots__ = ("_choices", "_reply")

    def __init__(self, reply: Reply, choices: range) -> None:
        self._reply = reply
        self._choices = choices

    def write(self, delta: SequenceDelta) -> None:
        self._reply.meter.cached_tokens[self._choices.start] = delta.num_cached_tokens
        if delta.prompt_logprobs is not None:
            # They come with the first delta of the first sequence, which is published first.
            for choice in self._reply.choices[self._choices.start : self._choices.stop]:
                choice.prompt_logprobs = delta.prompt_logprobs
        self._reply.write(self._choices[delta.index], delta)

    def flush(self) -> None:
        self._reply.flush()

    def finish(self) -> None:
        self._reply.finish_prompt()

    def fail(self, error: GraphLLMError) -> None:
        self._reply.fail(error)


class UsageMeter:
    """Counts the tokens of a reply. cached_tokens: by the first choice of each prompt.

    Apart from the reply, so that what asks for counts need not hold on to it: a reply in a cycle would keep
    its request, a body of many megabytes among it, until the next full collection.
    """

    __slots__ = ("cached_tokens", "prompt_tokens", "readers")

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.cached_tokens: dict[int, int] = {}
        self.readers: list[ChoiceReader] = []

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=sum(reader.num_tokens for reader in self.readers),
            cached_tokens=sum(self.cached_tokens.values()),
            reasoning_tokens=sum(reader.num_reasoning_tokens for reader in self.readers),
        )


class Reply(ABC):
    """What all answers have in common. `readers[i]` reads choice i, which is there from the start."""

    def __init__(self, engine: RequestEngine, wire: Wire) -> None:
        self._engine = engine
        self._wire = wire
        self._request_ids: list[str] = []
        self._readers: list[ChoiceReader] = []
        self._num_unfinished_prompts = 0
        self.meter = UsageMeter()
        self._structure_name = "structured_outputs"
        self._is_open = True

    @property
    def choices(self) -> list[Choice]:
        return [reader.choice for reader in self._readers]

    def submit(self, generation: GenerationRequest) -> None:
        """Hand every prompt to the engine, or none: raises what `Engine.add` raises."""
        prompts, params = generation.prompts, generation.params
        self._num_unfinished_prompts = len(prompts)
        self.meter.prompt_tokens = sum(map(len, prompts))
        self._structure_name = generation.structure_name
        self._readers = [
            ChoiceReader(
                Choice(index),
                generation,
                new_call_id=self._wire.new_call_id,
                keeps_text=self._keeps_text,
                keeps_token_ids=self._wire.wants_token_ids,
            )
            for index in range(len(prompts) * params.n)
        ]
        self.meter.readers = self._readers
        for position, prompt_token_ids in enumerate(prompts):
            request_id = self._wire.reply_id if len(prompts) == 1 else f"{self._wire.reply_id}-{position}"
            sink = PromptSink(self, range(position * params.n, (position + 1) * params.n))
            try:
                self._engine.add(
                    request_id,
                    prompt_token_ids,
                    params=params,
                    sink=sink,
                    cache_salt=generation.cache_salt,
                    priority=generation.priority,
                    lora=generation.lora,
                )
            except GraphLLMError:
                self.abandon()
                raise
            self._request_ids.append(request_id)

    def usage(self) -> Usage:
        return self.meter.usage()

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
        if isinstance(error, InvalidRequestError):
            error = renamed(error, {"structured_outputs": self._structure_name})
        self._send_failure(error)

    def write(self, choice_index: int, delta: SequenceDelta) -> None:
        if not self._is_open:
            return
        if delta.finish_reason is FinishReason.ABORT:
            self.fail(EngineUnavailableError("The request was cut short by the server."))
            return
        reader = self._readers[choice_index]
        self._write_pieces(reader, reader.read(delta))

    def finish_prompt(self) -> None:
        self._num_unfinished_prompts -= 1
        if self._num_unfinished_prompts == 0 and self._is_open:
            self._is_open = False
            self._complete()

    @property
    def _keeps_text(self) -> bool:
        return True

    @abstractmethod
    def flush(self) -> None: ...

    @abstractmethod
    def _write_pieces(self, reader: ChoiceReader, pieces: list[Piece]) -> None: ...

    @abstractmethod
    def _complete(self) -> None: ...

    @abstractmethod
    def _send_failure(self, error: GraphLLMError) -> None: ...


class ConnectedReply(Reply):
    """A reply whose client waits on a connection: when it goes away, so does the request."""

    def __init__(self, engine: RequestEngine, wire: Wire, *, request: Request, response: Response) -> None:
        super().__init__(engine, wire)
        self._request = request
        self._response = response
        # openai-python shows it as `_request_id`.
        self._headers = (("x-request-id", wire.reply_id),)

    def submit(self, generation: GenerationRequest) -> None:
        if self._request.disconnected:
            return
        self._request.on_disconnect = self.abandon
        super().submit(generation)


class StreamedReply(ConnectedReply):
    """Server-sent events, one write to the connection a step.

    The status line waits for the first token, so that a request that fails before it gets a proper
    status. Text that the detokenizer or a reader holds back costs no chunk; log probabilities wait for the
    chunk that carries the text.
    """

    def __init__(self, engine: RequestEngine, wire: Wire, *, request: Request, response: Response) -> None:
        super().__init__(engine, wire, request=request, response=response)
        self._is_started = False
        self._framer = ReplyFramer(wire, self.meter.usage)

    @property
    def _keeps_text(self) -> bool:
        return self._wire.keeps_text

    def _write_pieces(self, reader: ChoiceReader, pieces: list[Piece]) -> None:
        self._framer.add(reader.choice, pieces)

    def flush(self) -> None:
        if not self._is_open:
            return
        data = self._framer.take()
        if data:
            self._start()
            self._response.write_chunk(data)

    def _complete(self) -> None:
        self._framer.end(self.choices)
        self._start()
        self._response.end_stream(self._framer.take())

    def _send_failure(self, error: GraphLLMError) -> None:
        if not self._is_started:
            send_error(self._response, error)
            return
        # Cutting the connection after the event is what keeps a client that does not read error
        # events from taking half an answer for a whole one.
        self._response.write_chunk(self._framer.take() + self._wire.failure(error))
        self._response.abort_stream()

    def _start(self) -> None:
        if not self._is_started:
            self._is_started = True
            self._response.start_stream(content_type=sse.CONTENT_TYPE, headers=self._headers)


class WholeReply(ConnectedReply):
    """Collects every choice and sends one JSON body when the last sequence has ended."""

    def _write_pieces(self, reader: ChoiceReader, pieces: list[Piece]) -> None:
        """The readers keep everything."""

    def flush(self) -> None:
        """Nothing leaves before the end."""

    def _complete(self) -> None:
        self._prepare(self._wire.preparation(self.choices))

    def _prepare(self, work: Iterator[None]) -> None:
        """Do the wire's work a slice at a time, as other streams go on meanwhile, and send the answer."""
        if self._request.disconnected:
            return
        deadline = time.perf_counter() + _SLICE_SECONDS
        try:
            for _ in work:
                if time.perf_counter() > deadline:
                    asyncio.get_running_loop().call_soon(self._prepare, work)
                    return
            body = self._wire.whole(self.choices, self.usage())
        except Exception:
            logger.exception("an answer could not be written")
            self._send_failure(GraphLLMError("The server had an error while answering this request."))
            return
        self._response.send(200, body, headers=self._headers)

    def _send_failure(self, error: GraphLLMError) -> None:
        send_error(self._response, error)
