"""One offline call's prompts on their way through the engine, and the sinks that gather what comes of them.

Owns the bounded admission (a long list of prompts is tokenized as sequences finish, not all up front) and
Ctrl-C. What users call, and whose event loop runs it, is `llm.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from graphllm.engine.engine import Engine
from graphllm.engine.sink import Sink
from graphllm.errors import GraphLLMError, InvalidRequestError
from graphllm.models.pooled_texts import TextEncoder
from graphllm.outputs import CompletionOutput, RequestOutput, SequenceDelta
from graphllm.sampling_params import SamplingParams

Prompt = str | Mapping[str, Any]
Output = TypeVar("Output")


class OfflineJob(ABC, Generic[Output]):
    """One call's prompts, each of which becomes one `Output`."""

    pooling = False

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        prompts: list[Prompt],
        params: list[SamplingParams],
        loras: list[str | None],
        add_special_tokens: bool,
        bar: Any,
    ) -> None:
        self._loras = loras
        self._engine = engine
        self._name = name
        self._prompts = prompts
        self._params = params
        self._add_special_tokens = add_special_tokens
        self._bar = bar
        self._outputs: list[Output | None] = [None] * len(prompts)
        self._num_submitted = 0
        self._num_finished = 0
        self._is_admitting = False
        self._is_interrupted = False
        # Enough that the scheduler always has a next sequence at hand.
        self._max_unfinished = 2 * engine.config.max_num_seqs

    async def run(self) -> list[Output] | None:
        """Every prompt's output, or None when Ctrl-C came first. Raises what the engine refuses."""
        loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = loop.create_future()
        with _interrupts_to(self.interrupt, loop):
            try:
                self._admit()
                await self._ended
            finally:
                for position in range(self._num_submitted):
                    if self._outputs[position] is None:
                        self._engine.abort(self._request_id(position))
        if self._is_interrupted:
            return None
        return [output for output in self._outputs if output is not None]

    def interrupt(self) -> None:
        if not self._ended.done():
            self._is_interrupted = True
            self._ended.set_result(None)

    def finish(self, position: int, output: Output) -> None:
        self._outputs[position] = output
        self._num_finished += 1
        self._bar.update(1)
        if not self._is_admitting and not self._ended.done():
            # Not here: the engine is in the middle of a step's publishing.
            self._is_admitting = True
            asyncio.get_running_loop().call_soon(self._admit)

    def fail(self, error: BaseException) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)

    def _admit(self) -> None:
        """Submit prompts until enough are unfinished; end the job when all have finished."""
        self._is_admitting = False
        if self._ended.done():
            return
        try:
            while (
                self._num_submitted < len(self._prompts)
                and self._num_submitted - self._num_finished < self._max_unfinished
            ):
                self._submit(self._num_submitted)
                self._num_submitted += 1
        except Exception as error:  # whatever a prompt does, the job must end
            if len(self._prompts) > 1:
                error.add_note(f"raised by prompt {self._num_submitted} of {len(self._prompts)}")
            self.fail(error)
        else:
            if self._num_finished == len(self._prompts):
                self._ended.set_result(None)

    def _submit(self, position: int) -> None:
        entry = self._prompts[position]
        text: str | None
        if isinstance(entry, Mapping) and "prompt_token_ids" in entry:
            text, token_ids = entry.get("prompt"), list(entry["prompt_token_ids"])
            if any(type(token_id) is not int for token_id in token_ids):
                raise InvalidRequestError("prompt_token_ids must be integers.", param="prompt_token_ids")
        else:
            text = entry if isinstance(entry, str) else entry["prompt"]
            token_ids = self._encode(text)
        request_id, params = self._request_id(position), self._params[position]
        sink = self._new_sink(position, text, prompt_token_ids=token_ids)
        lora = self._loras[position]
        self._engine.add(request_id, token_ids, params=params, sink=sink, pooling=self.pooling, lora=lora)

    def _encode(self, text: str) -> list[int]:
        return self._engine.tokenizer.encode(text, add_special_tokens=self._add_special_tokens)

    @abstractmethod
    def _new_sink(self, position: int, prompt: str | None, *, prompt_token_ids: list[int]) -> Sink:
        """What gathers the output of one prompt and calls `finish` with it."""

    def _request_id(self, position: int) -> str:
        return f"{self._name}-{position}"


class GenerateJob(OfflineJob[RequestOutput]):
    """Continues each prompt."""

    def _new_sink(self, position: int, prompt: str | None, *, prompt_token_ids: list[int]) -> Sink:
        params = self._params[position]
        output = RequestOutput(
            request_id=self._request_id(position),
            prompt=prompt,
            prompt_token_ids=prompt_token_ids,
            outputs=[
                CompletionOutput(
                    index=index,
                    text="",
                    token_ids=[],
                    logprobs=None if params.logprobs is None else [],
                    finish_reason=None,
                    stop_reason=None,
                )
                for index in range(params.n)
            ],
            finished=False,
        )
        return _CollectingSink(self, position, output)


@dataclass(frozen=True, slots=True)
class Pooled:
    """What came of one prompt: [output_size] float32."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    result: array[float]


class PoolJob(OfflineJob[Pooled]):
    """Pools each prompt. encoder: of its text."""

    pooling = True

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        prompts: list[Prompt],
        loras: list[str | None],
        encoder: TextEncoder,
        bar: Any,
    ) -> None:
        params = [SamplingParams(max_tokens=0)] * len(prompts)
        super().__init__(
            engine, name, prompts=prompts, params=params, loras=loras, add_special_tokens=True, bar=bar
        )
        self._encoder = encoder

    def _encode(self, text: str) -> list[int]:
        return self._encoder.ids(text)

    def _new_sink(self, position: int, prompt: str | None, *, prompt_token_ids: list[int]) -> Sink:
        return _PoolingSink(self, position, prompt, prompt_token_ids=prompt_token_ids)

    def finish_prompt(
        self, position: int, prompt: str | None, *, prompt_token_ids: list[int], result: array[float]
    ) -> None:
        self.finish(position, Pooled(self._request_id(position), prompt, prompt_token_ids, result))


class _CollectingSink:
    """Gathers one request's sequences into a `RequestOutput`."""

    def __init__(self, job: GenerateJob, position: int, output: RequestOutput) -> None:
        self._job = job
        self._position = position
        self._output = output
        self._texts: list[list[str]] = [[] for _ in output.outputs]

    def write(self, delta: SequenceDelta) -> None:
        output = self._output.outputs[delta.index]
        self._texts[delta.index].append(delta.text)
        output.token_ids.extend(delta.token_ids)
        if output.logprobs is not None and delta.logprobs is not None:
            output.logprobs.extend(delta.logprobs)
        if delta.finish_reason is not None:
            output.finish_reason = delta.finish_reason
            output.stop_reason = delta.stop_reason
        if delta.prompt_logprobs is not None:
            self._output.prompt_logprobs = delta.prompt_logprobs

    def flush(self) -> None:
        """Nobody reads before the end."""

    def finish(self) -> None:
        for output, texts in zip(self._output.outputs, self._texts, strict=True):
            output.text = "".join(texts)
        self._output.finished = True
        self._job.finish(self._position, self._output)

    def fail(self, error: GraphLLMError) -> None:
        self._job.fail(error)


class _PoolingSink:
    """Waits for one prompt's result."""

    def __init__(
        self, job: PoolJob, position: int, prompt: str | None, *, prompt_token_ids: list[int]
    ) -> None:
        self._job = job
        self._position = position
        self._prompt = prompt
        self._prompt_token_ids = prompt_token_ids
        self._result: array[float] | None = None

    def write(self, delta: SequenceDelta) -> None:
        self._result = delta.pooled

    def flush(self) -> None:
        """Nobody reads before the end."""

    def finish(self) -> None:
        assert self._result is not None, "pooling answers with a result"
        self._job.finish_prompt(
            self._position, self._prompt, prompt_token_ids=self._prompt_token_ids, result=self._result
        )

    def fail(self, error: GraphLLMError) -> None:
        self._job.fail(error)


@contextlib.contextmanager
def _interrupts_to(callback: Callable[[], None], loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Have the event loop call `callback` for Ctrl-C, which then never strikes inside a step.

    Off the main thread, where no signal arrives, this does nothing.
    """
    earlier = signal.getsignal(signal.SIGINT)
    try:
        loop.add_signal_handler(signal.SIGINT, callback)
    except (ValueError, RuntimeError):
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        if earlier is not None:
            signal.signal(signal.SIGINT, earlier)
