"""The offline API: the same engine as the server's, driven from the calling thread.

    with LLM("demo") as llm:
        print(llm.generate("The capital of France is")[0].outputs[0].text)

Owns the shapes that vLLM users know, the event loop that the engine runs on while a call waits, and
a bounded admission: a long list of prompts is tokenized as sequences finish, not all up front.
Nothing runs between calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import uvloop
from tqdm import tqdm

from graphllm.config import EngineConfig
from graphllm.engine.engine import Engine
from graphllm.errors import GraphLLMError, InvalidRequestError
from graphllm.outputs import CompletionOutput, RequestOutput, SequenceDelta
from graphllm.sampling_params import SamplingParams

tqdm.monitor_interval = 0  # its monitor is a thread

T = TypeVar("T")
Prompt = str | Mapping[str, Any]
Conversation = Sequence[Mapping[str, Any]]

# What vLLM and /v1/completions generate for a prompt whose parameters are not given.
DEFAULT_MAX_TOKENS = 16


class LLM:
    """A model in this process, for many prompts at once.

    model: as `--model`: a folder, a .gguf file or "demo". The rest are the fields of `EngineConfig`.
    Raises StartupError when the model cannot be loaded.

    Calls come from one thread at a time. They also work where an event loop is running already (a
    notebook): that loop stands still until the call returns.
    """

    def __init__(self, model: str = "demo", **engine_config: Any) -> None:
        self._engine = Engine(EngineConfig(model=model, **engine_config))
        self._loop: asyncio.AbstractEventLoop | None = uvloop.new_event_loop()
        self._num_calls = 0
        try:
            self._run(self._engine.start(show_progress=True))
        except (GraphLLMError, OSError):
            self.close()
            raise

    @property
    def engine(self) -> Engine:
        """The engine, for its tokenizer, metrics and limits."""
        return self._engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue each prompt; results are in the prompts' order.

        A prompt is a text, `{"prompt": text}` or `{"prompt_token_ids": [...]}`. `sampling_params` is
        one for all or one for each; by default 16 tokens at temperature 1. A progress bar shows for
        more than one prompt. Ctrl-C aborts what is running and leaves the LLM usable.

        Raises InvalidRequestError for a prompt or parameters that cannot work; nothing is returned
        then, and nothing goes on running.
        """
        entries = _as_prompts(prompts)
        params = _params_for_each(
            sampling_params, len(entries), default=SamplingParams(max_tokens=DEFAULT_MAX_TOKENS)
        )
        return self._generate(entries, params, use_tqdm=use_tqdm, add_special_tokens=True)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """The assistant's next message of one conversation, or of each of several.

        A conversation is a list of `{"role": ..., "content": ...}`. Without `sampling_params` an
        answer runs to its end or the context's, at temperature 1.

        Raises InvalidRequestError, also when the model has no chat template.
        """
        conversations = _as_conversations(messages)
        tokenizer = self._engine.tokenizer
        if tokenizer.chat_template is None:
            raise InvalidRequestError("This model has no chat template; use generate().", param="messages")
        entries: list[Prompt] = [
            tokenizer.render_chat(
                [dict(message) for message in conversation],
                add_generation_prompt=add_generation_prompt,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        params = _params_for_each(sampling_params, len(entries), default=SamplingParams())
        # The template has written the special tokens itself.
        return self._generate(entries, params, use_tqdm=use_tqdm, add_special_tokens=False)

    def close(self) -> None:
        """Release the model and its memory. Closing again does nothing."""
        if self._loop is None:
            return
        self._run(self._engine.stop())
        self._loop.close()
        self._loop = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _generate(
        self, prompts: list[Prompt], params: list[SamplingParams], *, use_tqdm: bool, add_special_tokens: bool
    ) -> list[RequestOutput]:
        self._num_calls += 1
        with tqdm(
            total=len(prompts), desc="Prompts", unit="prompt", disable=not use_tqdm or len(prompts) < 2
        ) as bar:
            job = _Job(
                self._engine,
                f"offline-{self._num_calls}",
                prompts=prompts,
                params=params,
                add_special_tokens=add_special_tokens,
                bar=bar,
            )
            outputs = self._run(job.run())
        if outputs is None:
            raise KeyboardInterrupt
        return outputs

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            work.close()
            raise RuntimeError("This LLM is closed.")
        with _outer_loop_set_aside():
            return self._loop.run_until_complete(work)


class _Job:
    """One call's prompts on their way through the engine."""

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        prompts: list[Prompt],
        params: list[SamplingParams],
        add_special_tokens: bool,
        bar: Any,
    ) -> None:
        self._engine = engine
        self._name = name
        self._prompts = prompts
        self._params = params
        self._add_special_tokens = add_special_tokens
        self._bar = bar
        self._outputs: list[RequestOutput | None] = [None] * len(prompts)
        self._num_submitted = 0
        self._num_finished = 0
        self._is_admitting = False
        self._is_interrupted = False
        # Enough that the scheduler always has a next sequence at hand.
        self._max_unfinished = 2 * engine.config.max_num_seqs

    async def run(self) -> list[RequestOutput] | None:
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

    def finish(self, position: int, output: RequestOutput) -> None:
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
            token_ids = self._engine.tokenizer.encode(text, add_special_tokens=self._add_special_tokens)
        request_id, params = self._request_id(position), self._params[position]
        sink = _CollectingSink(
            self, position, request_id=request_id, prompt=text, prompt_token_ids=token_ids, params=params
        )
        self._engine.add(request_id, token_ids, params=params, sink=sink)

    def _request_id(self, position: int) -> str:
        return f"{self._name}-{position}"


class _CollectingSink:
    """Gathers one request's sequences into a `RequestOutput`."""

    def __init__(
        self,
        job: _Job,
        position: int,
        *,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
    ) -> None:
        self._job = job
        self._position = position
        self._texts: list[list[str]] = [[] for _ in range(params.n)]
        self._output = RequestOutput(
            request_id=request_id,
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

    def write(self, delta: SequenceDelta) -> None:
        output = self._output.outputs[delta.index]
        self._texts[delta.index].append(delta.text)
        output.token_ids.extend(delta.token_ids)
        if output.logprobs is not None and delta.logprobs is not None:
            output.logprobs.extend(delta.logprobs)
        if delta.finish_reason is not None:
            output.finish_reason = delta.finish_reason
            output.stop_reason = delta.stop_reason

    def flush(self) -> None:
        """Nobody reads before the end."""

    def finish(self) -> None:
        for output, texts in zip(self._output.outputs, self._texts, strict=True):
            output.text = "".join(texts)
        self._output.finished = True
        self._job.finish(self._position, self._output)

    def fail(self, error: GraphLLMError) -> None:
        self._job.fail(error)


@contextlib.contextmanager
def _outer_loop_set_aside() -> Iterator[None]:
    """Let a loop be run inside a callback of another one, which stands still meanwhile."""
    outer = asyncio._get_running_loop()
    if outer is None:
        yield
        return
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        asyncio._set_running_loop(outer)


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


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Raises InvalidRequestError for anything that is no prompt."""
    entries = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
    for position, entry in enumerate(entries):
        is_prompt = isinstance(entry, str) or (
            isinstance(entry, Mapping)
            and (isinstance(entry.get("prompt"), str) or "prompt_token_ids" in entry)
        )
        if not is_prompt:
            raise InvalidRequestError(
                f'Prompt {position} must be a text, {{"prompt": text}} or {{"prompt_token_ids": [...]}}, '
                f"not {type(entry).__name__}.",
                param="prompts",
            )
    return entries


def _as_conversations(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    if not messages:
        raise InvalidRequestError("messages must not be empty.", param="messages")
    if isinstance(messages[0], Mapping):
        return [messages]  # type: ignore[list-item]  # one conversation: its entries are messages
    return list(messages)  # type: ignore[arg-type]  # several: its entries are lists of messages


def _params_for_each(
    sampling_params: SamplingParams | Sequence[SamplingParams] | None, count: int, *, default: SamplingParams
) -> list[SamplingParams]:
    if sampling_params is None:
        return [default] * count
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * count
    if len(sampling_params) != count:
        raise InvalidRequestError(
            f"There are {count} prompts and {len(sampling_params)} sampling parameters; "
            "give one for all, or one for each.",
            param="sampling_params",
        )
    return list(sampling_params)
