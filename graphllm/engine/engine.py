"""One served model: its life, and who may use it.

Owns the engine's state (loading, ready, draining, failed) and the admission of requests. The step
loop is in `engine/step_loop.py`; model and memory are put together in `engine/loading.py`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from enum import StrEnum
from functools import partial

from graphllm.adapter import Adapter
from graphllm.config import EngineConfig, split_lora_module
from graphllm.engine.adapters import AdapterRegistry
from graphllm.engine.constraints import PendingConstraints
from graphllm.engine.garbage import GarbageKeeper
from graphllm.engine.loading import load
from graphllm.engine.metrics import EngineMetrics
from graphllm.engine.pinned_prefixes import PinnedPrefix, PinnedPrefixes, read_prefix_file
from graphllm.engine.progress import progress_bar
from graphllm.engine.sink import Sink
from graphllm.engine.step_loop import StepLoop
from graphllm.engine.waiting_grammars import WaitingGrammars, give_constraints
from graphllm.errors import (
    CheckpointError,
    ConfigError,
    ContextLengthError,
    EngineUnavailableError,
    GraphLLMError,
    InvalidRequestError,
    NotFoundError,
)
from graphllm.models.pooling import PoolingConfig
from graphllm.outputs import SequenceDelta
from graphllm.runner.compilation import CompilationWatch
from graphllm.runner.device import Device, open_device
from graphllm.runner.graph_runner import GraphRunner
from graphllm.sampling_params import MAX_PROMPT_LOGPROBS, SamplingParams
from graphllm.sequence import SequenceGroup
from graphllm.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class EngineState(StrEnum):
    """LOADING -> READY -> DRAINING -> STOPPED, and FAILED from anywhere."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


class Engine:
    """Serves one model. Every method runs on the event loop that `start` ran on.

    `on_failure` is called once when a loaded engine can no longer serve. With `manage_gc` the
    process's garbage collector is frozen after warm-up and run between steps: right for a server,
    rude in somebody else's process. Requests that bring no cache salt have `default_cache_salt`; only
    requests of one salt share what is in the prefix cache. `base_name` is what requests call the base model,
    so that no adapter takes it.
    """

    def __init__(
        self, config: EngineConfig, *, device: Device | None = None, manage_gc: bool = False
    ) -> None:
        self.config = config
        self.metrics = EngineMetrics()
        self.state = EngineState.LOADING
        self.failure: str | None = None
        self.on_failure: Callable[[], None] | None = None
        self.default_cache_salt: str | None = None
        self.base_name = config.model
        self._device = device or open_device(config.device, cpu_threads=config.cpu_threads)
        self._garbage = GarbageKeeper(enabled=manage_gc)
        self._random = random.Random(config.seed)
        self._compilations = CompilationWatch(self._compiled)
        self._step_loop: StepLoop | None = None
        self._compiling = WaitingGrammars(
            self.metrics, admit=lambda group, sink: self._loaded.add(group, sink)
        )
        self._prefixes: PinnedPrefixes | None = None
        self._task: asyncio.Task[None] | None = None

    # -- life -------------------------------------------------------------------------------------

    async def start(self, *, show_progress: bool = False) -> None:
        """Load the model, start the step loop, run one request through it, pin prefixes; READY on return.

        Raises StartupError (bad flags, bad checkpoint) with the engine FAILED.
        """
        try:
            model = await self._device.run(
                lambda: load(self.config, self._device, show_progress=show_progress)
            )
        except BaseException as error:
            self.state, self.failure = EngineState.FAILED, str(error)
            raise
        self._step_loop = StepLoop(
            model,
            self._device,
            metrics=self.metrics,
            garbage=self._garbage,
            look_ahead=self.config.look_ahead,
            debug_kv=self.config.debug_kv,
            on_failed=self._loop_failed,
        )
        if self.config.eager_capture and model.runner.graphs.is_enabled:
            await _capture_all(model.runner.graphs, show_progress=show_progress)
        self._task = asyncio.get_running_loop().create_task(self._step_loop.run(), name="step-loop")
        await self._warm_up(self._step_loop)
        await self._load_modules()
        self._prefixes = PinnedPrefixes(model.scheduler, self._add)
        await self._pin_files(self._prefixes)
        self._compilations.start()
        self._garbage.freeze()
        self.state = EngineState.READY

    async def drain(self, timeout: float) -> bool:
        """Admit nothing more; wait until every request has ended. False when `timeout` cut it short."""
        if self.state is EngineState.READY:
            self.state = EngineState.DRAINING
        deadline = time.perf_counter() + timeout
        while self.num_unfinished_requests and self.state is EngineState.DRAINING:
            if time.perf_counter() >= deadline:
                return False
            await asyncio.sleep(0.01)
        return True

    async def stop(self) -> None:
        """End every open request with an error, let the device finish, release it."""
        if self._step_loop is not None and self._task is not None:
            self._fail_all(EngineUnavailableError("The server is shutting down."))
            self._step_loop.model.constraints.close()
            self._step_loop.stop()
            await self._task
            self._step_loop.model.runner.graphs.close()
        if self.state is not EngineState.FAILED:
            self.state = EngineState.STOPPED
        self._compilations.stop()
        self._device.close()
        self._garbage.release()

    def check_ready(self) -> None:
        """Raise EngineUnavailableError, with the reason, unless requests are admitted."""
        if self.state is EngineState.READY:
            return
        reasons = {
            EngineState.LOADING: "The model is loading.",
            EngineState.DRAINING: "The server is shutting down.",
            EngineState.STOPPED: "The server has stopped.",
            EngineState.FAILED: f"The engine has failed: {self.failure}",
        }
        raise EngineUnavailableError(reasons[self.state])

    def check_generates(self) -> None:
        """Raise InvalidRequestError for a model that was published for something else."""
        purpose = self.pooling.purpose
        if purpose == "embed":
            raise InvalidRequestError(
                "This model is for embeddings and generates no text; use /v1/embeddings.", param="model"
            )
        if purpose == "score":
            raise InvalidRequestError(
                "This model is for scores and generates no text; use /v1/score, /v1/rerank or /v1/classify.",
                param="model",
            )

    @property
    def pooling(self) -> PoolingConfig:
        """What the model is for, and what becomes of the hidden states of a pooling request."""
        return self._loaded.model.pooling

    @property
    def tokenizer(self) -> Tokenizer:
        return self._loaded.model.tokenizer

    @property
    def max_model_len(self) -> int:
        """Longest sequence in tokens, prompt and output together."""
        return self._loaded.model.plan.max_model_len

    @property
    def num_unfinished_requests(self) -> int:
        return 0 if self._step_loop is None else self._step_loop.num_requests + len(self._compiling)

    @property
    def _loaded(self) -> StepLoop:
        assert self._step_loop is not None, "the model is loaded before it is used"
        return self._step_loop

    # -- requests ---------------------------------------------------------------------------------

    def add(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        *,
        params: SamplingParams,
        sink: Sink,
        cache_salt: str | None = None,
        priority: int = 0,
        pooling: bool = False,
        lora: str | None = None,
    ) -> None:
        """Admit a request; its tokens go to `sink`.

        A lower `priority` runs earlier, and gives way later when memory is short; equal ones take turns by
        arrival.
        With max_tokens 0 the prompt is computed, and scored if prompt_logprobs ask for it, and nothing is
        generated. With `pooling`, which needs max_tokens 0 and n 1, the answer is what `self.pooling` makes
        of the prompt's hidden states; scores come as logits.
        `lora` is the name of a loaded adapter, None for the base model.
        A request whose grammar takes long to compile waits for it: what is wrong with the grammar then
        reaches the sink, as InvalidRequestError.

        Raises InvalidRequestError (token ids, lengths, grammars, what the model is not for),
        ModelNotFoundError (the adapter),
        EngineUnavailableError.
        """
        self.check_ready()
        if not pooling:
            self.check_generates()
        if pooling and (params.max_tokens != 0 or params.n != 1):
            raise InvalidRequestError(
                "Pooling generates nothing: max_tokens must be 0, and n 1.", param="max_tokens"
            )
        self._add(
            request_id,
            prompt_token_ids,
            params,
            sink,
            cache_salt,
            priority=priority,
            pooling=pooling,
            lora=lora,
        )
        self.metrics.requests.inc()
        self.metrics.prompt_tokens.inc(len(prompt_token_ids))

    def abort(self, request_id: str) -> None:
        """End a request without telling its sink. Unknown and ended requests are no error."""
        if self._step_loop is not None and not self._compiling.abort(request_id):
            self._step_loop.abort(request_id)

    @property
    def adapters(self) -> AdapterRegistry:
        """Raises InvalidRequestError where none are served."""
        registry = self._loaded.model.adapters
        if registry is None:
            raise InvalidRequestError("This server has no adapters; start it with --enable-lora.")
        return registry

    def has_adapter(self, name: str) -> bool:
        """Whether requests may name this adapter."""
        return any(adapter.name == name for adapter in self.loaded_adapters)

    @property
    def loaded_adapters(self) -> list[Adapter]:
        registry = None if self._step_loop is None else self._step_loop.model.adapters
        return [] if registry is None else registry.adapters

    async def pin_prefix(self, token_ids: list[int], *, cache_salt: str | None = None) -> PinnedPrefix:
        """Compute a prefix, in turn with the requests, and keep it in the KV cache until it is unpinned.

        Raises InvalidRequestError for one that cannot be kept, EngineUnavailableError.
        """
        self.check_ready()
        assert self._prefixes is not None, "a ready engine can pin"
        return await self._prefixes.pin(token_ids, cache_salt or self.default_cache_salt)

    def unpin_prefix(self, prefix_id: str) -> None:
        """Raises NotFoundError for an id that is not pinned."""
        try:
            assert self._prefixes is not None
            self._prefixes.unpin(prefix_id)
        except KeyError:
            raise NotFoundError(f"No prefix {prefix_id[:60]!r} is pinned.") from None

    @property
    def pinned_prefixes(self) -> list[PinnedPrefix]:
        return [] if self._prefixes is None else self._prefixes.pinned

    def _add(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        sink: Sink,
        cache_salt: str | None,
        *,
        priority: int = 0,
        pooling: bool = False,
        lora: str | None = None,
    ) -> None:
        model = self._loaded.model
        if not (pooling or model.is_causal):
            raise InvalidRequestError(
                "This model computes whole texts only; it has no prefixes.", param="model"
            )
        max_total_tokens = self._check_lengths(prompt_token_ids, params)
        constraint_of = model.constraints.build(params) if params.max_tokens != 0 else None
        group = SequenceGroup(
            request_id,
            prompt_token_ids,
            params=params,
            seed=self._random.getrandbits(63) if params.seed is None else params.seed,
            max_total_tokens=max_total_tokens,
            arrival_time=time.perf_counter(),
            cache_salt=cache_salt or self.default_cache_salt,
            priority=priority,
            skips_prefix_lookup=pooling and model.pooling.needs_all_tokens,
            pooling=pooling,
            keeps_device_state=pooling and model.pooling.needs_all_tokens,
            in_one_step=not model.is_causal,
            adapter=None if lora is None else self.adapters.find(lora),
        )
        if isinstance(constraint_of, PendingConstraints):
            self._compiling.add(group, sink, constraint_of)
            return
        if constraint_of is not None:
            give_constraints(group, constraint_of)
        try:
            self._loaded.add(group, sink)
        except GraphLLMError:  # it keeps no adapter
            group.forget()
            raise

    def _check_lengths(self, prompt_token_ids: list[int], params: SamplingParams) -> int:
        """The most tokens the request may reach. Raises InvalidRequestError."""
        context, length = self.max_model_len, len(prompt_token_ids)
        vocab_size = self._loaded.model.vocab_size
        if length == 0:
            raise InvalidRequestError("The prompt is empty.", param="prompt")
        if params.max_tokens == 0 and length > context:
            raise ContextLengthError(
                f"The prompt has {length} tokens, more than the model's context of {context} tokens.",
                param="prompt",
            )
        if params.max_tokens != 0 and length >= context:
            raise ContextLengthError(
                f"The prompt has {length} tokens, and the model's context of {context} tokens must hold "
                "the prompt and at least one token of output.",
                param="prompt",
            )
        if min(prompt_token_ids) < 0 or max(prompt_token_ids) >= vocab_size:
            wrong = next(token for token in prompt_token_ids if not 0 <= token < vocab_size)
            raise InvalidRequestError(
                f"The prompt has token id {wrong}; the vocabulary has {vocab_size} tokens.", param="prompt"
            )
        params.check_token_ids(vocab_size)
        _check_prompt_logprobs(length, params)
        if params.max_tokens is None:
            return context
        if params.max_tokens == 0:
            return length + 1  # with the token that ends the prompt's computation and is dropped
        if length + params.max_tokens > context:
            raise ContextLengthError(
                f"The prompt has {length} tokens and max_tokens is {params.max_tokens}: together more than "
                f"the model's context of {context} tokens.",
                param="max_tokens",
            )
        return length + params.max_tokens

    async def _warm_up(self, step_loop: StepLoop) -> None:
        """Run one request, so that the first user meets no first-time cost. Raises StepFailedError."""
        waiter = _Waiter()
        length = max(1, min(32, self.max_model_len - 4))
        pools = self.pooling.purpose != "generate"
        num_new = 0 if pools else min(3, self.max_model_len - length)
        params = SamplingParams(max_tokens=num_new, ignore_eos=True, seed=0)
        prompt = [index % step_loop.model.vocab_size for index in range(length)]
        # A salt of its own: no user's request is to begin with it.
        self._add("warm-up", prompt, params, waiter, "warm-up", pooling=pools)
        await waiter.ended

    async def _pin_files(self, prefixes: PinnedPrefixes) -> None:
        """Pin what `--pin-prefix` names. Raises ConfigError, naming the file."""
        for path in self.config.pin_prefix or ():
            token_ids = await self._device.run(partial(read_prefix_file, path, self.tokenizer))
            try:
                pinned = await prefixes.pin(token_ids, self.default_cache_salt)
            except InvalidRequestError as error:
                raise ConfigError(f"--pin-prefix {path}: {error.message}") from error
            logger.info("pinned %s: %d tokens", path, pinned.num_tokens)

    async def _load_modules(self) -> None:
        """Load what `--lora-modules` names. Raises StartupError, naming the adapter and the file."""
        if self._loaded.model.adapters is not None:
            self._loaded.model.adapters.reserved_names = frozenset({self.base_name})
        for text in self.config.lora_modules or ():
            name, path = split_lora_module(text)
            try:
                adapter = await self.adapters.load(name, path)
            except InvalidRequestError as error:
                raise ConfigError(f"--lora-modules {name}: {error.message}") from error
            except CheckpointError as error:
                raise CheckpointError(f"--lora-modules {name}: {error.message}") from error
            logger.info("adapter %s: rank %d, %s", name, adapter.rank, path)

    def _fail_all(self, error: GraphLLMError) -> None:
        self._compiling.fail_all(error)
        self._loaded.fail_all(error)

    def _compiled(self, kernel: str, seconds: float) -> None:
        """A kernel was compiled while serving: every stream waited for it."""
        logger.warning("kernel %s was compiled on the event loop, in %.2f s", kernel, seconds)
        self.metrics.kernel_compilations.inc()

    def _loop_failed(self, reason: str) -> None:
        self.state, self.failure = EngineState.FAILED, reason
        try:
            self._fail_all(EngineUnavailableError(f"The engine has failed: {reason}"))
        finally:
            if self.on_failure is not None:
                self.on_failure()


def _check_prompt_logprobs(num_tokens: int, params: SamplingParams) -> None:
    """Raise InvalidRequestError for more numbers than a request may bring back."""
    if params.prompt_logprobs is None:
        return
    if num_tokens * (params.prompt_logprobs + 1) > MAX_PROMPT_LOGPROBS:
        most = MAX_PROMPT_LOGPROBS // num_tokens - 1
        advice = f"at most {most} for this prompt" if most >= 0 else "none for a prompt as long as this"
        raise InvalidRequestError(
            f"prompt_logprobs of {params.prompt_logprobs} for {num_tokens} tokens is more than the server "
            f"reports: {advice}.",
            param="prompt_logprobs",
        )


async def _capture_all(graphs: GraphRunner, *, show_progress: bool) -> None:
    """Capture every graph of steady traffic, while the loop goes on answering."""
    with progress_bar("Capturing graphs", "graph", show=show_progress) as advance:
        for done, total in graphs.capture_all_in_slices():
            advance(done, total)
            await asyncio.sleep(0)


class _Waiter:
    """A sink that only waits for the end."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def write(self, delta: SequenceDelta) -> None:
        """Nobody reads it."""

    def flush(self) -> None:
        """Nothing was written."""

    def finish(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def fail(self, error: GraphLLMError) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)
