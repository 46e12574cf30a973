"""Puts model, memory, scheduler and runner together from a configuration.

Runs on the device's worker, because reading weights and building a tokenizer take seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch

from graphllm.arena import Arena
from graphllm.cache.block_manager import BlockManager
from graphllm.cache.host_tier import HostTier
from graphllm.cache.kv_cache import KVCache, resolve_kv_dtype
from graphllm.cache.swap import BlockSwapper
from graphllm.config import EngineConfig
from graphllm.engine.adapters import AdapterRegistry
from graphllm.engine.constraints import ConstraintBuilder, StructuredCompiler
from graphllm.engine.measured_rates import MeasuredRates
from graphllm.engine.pooling_limits import limits_of_purpose, with_sizes
from graphllm.engine.progress import progress_bar
from graphllm.errors import CheckpointError, ConfigError
from graphllm.layers.lora import AdapterMemory
from graphllm.models.adapter_names import AdapterNames
from graphllm.models.checkpoint import open_model, resolve_model
from graphllm.models.config import resolve_dtype
from graphllm.models.decoder import Decoder
from graphllm.models.family import Family
from graphllm.models.pooling import PoolingConfig, load_pooler, read_pooling
from graphllm.models.quantization import read_quantization, refuse_quantization
from graphllm.models.registry import find_family, read_model_config
from graphllm.models.served import ServedModel
from graphllm.models.transformers_fallback import FallbackDecoder, find_fallback
from graphllm.models.weights import load_model
from graphllm.runner.assembly import assemble_step, choose_backend, measure_largest_step
from graphllm.runner.compilation import AheadCompilation
from graphllm.runner.device import Device
from graphllm.runner.memory_plan import (
    DeviceMemory,
    HostPlan,
    MemoryPlan,
    free_host_bytes,
    plan_device_memory,
    plan_host,
    plan_limits,
    plan_memory,
    plan_pinned_blocks,
)
from graphllm.runner.model_runner import ModelRunner
from graphllm.runner.sampler import MAX_EOS_TOKEN_IDS
from graphllm.scheduler.adapter_places import AdapterPlaces
from graphllm.scheduler.scheduler import Scheduler, SchedulerLimits
from graphllm.scheduler.slots import SlotAllocator
from graphllm.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Everything that exists once per served model."""

    tokenizer: Tokenizer
    plan: MemoryPlan
    scheduler: Scheduler
    runner: ModelRunner
    swapper: BlockSwapper
    rates: MeasuredRates
    constraints: ConstraintBuilder
    pooling: PoolingConfig
    is_causal: bool
    vocab_size: int
    adapter_memory: AdapterMemory | None
    adapters: AdapterRegistry | None
    quantization: str
    """How weights are stored; "" for plain numbers."""


def load(config: EngineConfig, device: Device, *, show_progress: bool) -> LoadedModel:
    """Read the checkpoint, plan memory, allocate it. Raises StartupError."""
    path = resolve_model(config)
    checkpoint = open_model(path, config.load_format)
    family = None
    tokenizer = checkpoint.load_tokenizer()
    fallback = find_fallback(
        checkpoint, model_impl=config.model_impl, trust_remote_code=config.trust_remote_code
    )
    torch_device = device.torch_device
    quantization, family = "", None
    if fallback is None:
        family = find_family(checkpoint)
        model_config = read_model_config(checkpoint, family)
        stored = read_quantization(checkpoint, asked=config.quantization)
        stored.check_device(device_type=torch_device.type, capability=device_capability(torch_device))
        quantization = stored.description
    else:
        refuse_quantization(checkpoint, asked=config.quantization)
        model_config = fallback.config
        if config.serves_lora:
            raise ConfigError(
                "--enable-lora needs a model that graphllm computes itself; transformers computes this one."
            )
    pooling = with_sizes(read_pooling(checkpoint, family, model_config), config.matryoshka_dimensions)
    model_config, config = limits_of_purpose(config, model_config, pooling, device_type=torch_device.type)
    captures = not config.enforce_eager
    dtype = resolve_dtype(config.dtype, model_config.dtype, device_type=torch_device.type)
    limits = plan_limits(
        config, model_context=model_config.max_position_embeddings, device_type=torch_device.type
    )
    kv_shape = model_config.kv_cache_shape(
        block_size=config.block_size,
        max_model_len=limits.max_model_len,
        dtype=resolve_kv_dtype(config.kv_cache_dtype, dtype, capability=device_capability(torch_device)),
    )
    arena = Arena(torch_device)
    backend = choose_backend(config, limits, device, arena=arena)
    free_at_start = 0 if device.graphs is None else device.graphs.free_bytes()
    # Helpers must not look a branch up again, which may have moved.
    resolved = replace(config, model=str(path), revision=None, gguf_file=None)
    compiles_ahead = torch_device.type == "cuda" and fallback is None
    with ExitStack() as stack:
        ahead = stack.enter_context(AheadCompilation(resolved)) if compiles_ahead else None
        advance = stack.enter_context(progress_bar("Loading weights", "tensor", show=show_progress))
        with memory_errors_explained("the weights"):
            model: ServedModel
            if fallback is None:
                model = load_model(
                    checkpoint,
                    backend=backend,
                    device=torch_device,
                    dtype=dtype,
                    progress=advance,
                    max_model_len=limits.max_model_len,
                    quantization=config.quantization,
                )
            else:
                module = fallback.load(backend=backend, device=torch_device, dtype=dtype, progress=advance)
                captures = captures and device.graphs is not None and _may_be_captured(module)
                model = module
            pooler = load_pooler(checkpoint, pooling, tokenizer=tokenizer, device=torch_device)
        if ahead is not None:
            ahead.wait()
    with memory_errors_explained("intermediates, tables and the KV cache"):
        if device.graphs is None:
            parts = assemble_step(config, limits, device, model=model, arena=arena, pooler=pooler)
            plan = plan_memory(
                config,
                kv_shape,
                model_context=model_config.max_position_embeddings,
                free_bytes=free_host_bytes(),
            )
            graph_bytes = 0
        else:
            device.graphs.trim()
            free_after_weights = device.graphs.free_bytes()
            parts = assemble_step(config, limits, device, model=model, arena=arena, pooler=pooler)
            measured = measure_largest_step(parts, kv_shape, graphs_enabled=captures)
            graph_bytes = measured.graph_bytes
            memory = DeviceMemory(
                total_bytes=device.graphs.total_bytes,
                free_bytes_at_start=free_at_start,
                free_bytes_after_weights=free_after_weights,
                arena_bytes=arena.num_bytes,
                table_bytes=max(0, free_after_weights - measured.free_bytes - arena.num_bytes),
                graph_bytes=graph_bytes,
            )
            plan = plan_device_memory(config, kv_shape, limits=limits, memory=memory)
        kv_cache = KVCache(kv_shape, plan.num_blocks, device=torch_device)
    eos_token_ids = _end_token_ids(tokenizer, model_config.vocab_size)
    program = parts.program(kv_cache)
    graphs = parts.graphs(program, enabled=captures, max_bytes=graph_bytes)
    runner = parts.new_runner(program, graphs, limits=limits, kv_cache=kv_cache, eos_token_ids=eos_token_ids)
    host = plan_host(
        config,
        kv_shape,
        device_type=torch_device.type,
        free_bytes=free_host_bytes() - (plan.kv_cache_bytes if device.graphs is None else 0),
    )
    rates = MeasuredRates(kv_shape.bytes_per_block)
    logger.info(
        "%s: %s%s, context %d, %d KV blocks of %d tokens (%s, %.2f GiB), %d more on the host",
        config.model,
        str(dtype).removeprefix("torch."),
        f", weights in {quantization}" if quantization else "",
        plan.max_model_len,
        plan.num_blocks - 1,
        plan.block_size,
        str(kv_shape.dtype).removeprefix("torch."),
        plan.kv_cache_bytes / 1024**3,
        host.num_blocks,
    )
    return LoadedModel(
        tokenizer=tokenizer,
        plan=plan,
        scheduler=_build_scheduler(
            config,
            plan,
            host=host,
            rates=rates,
            windows=kv_shape.groups.windows,
            kv_fingerprint=f"{kv_shape.dtype} {quantization}",
            eos_token_ids=eos_token_ids,
        ),
        runner=runner,
        swapper=_build_swapper(kv_cache, host, device=device),
        rates=rates,
        constraints=ConstraintBuilder(
            tokenizer,
            vocab_size=model_config.vocab_size,
            eos_token_ids=eos_token_ids,
            compiler=_build_compiler(tokenizer, model_config.vocab_size, eos_token_ids),
        ),
        pooling=pooling,
        is_causal=model_config.is_causal,
        vocab_size=model_config.vocab_size,
        adapter_memory=parts.adapters,
        adapters=_build_registry(config, model, family, memory=parts.adapters, device=device),
        quantization=quantization,
    )


def _build_registry(
    config: EngineConfig,
    model: ServedModel,
    family: Family | None,
    *,
    memory: AdapterMemory | None,
    device: Device,
) -> AdapterRegistry | None:
    """Who knows the adapters; None where none are served."""
    if memory is None:
        return None
    assert isinstance(model, Decoder) and family is not None, "only these have places for adapters"
    return AdapterRegistry(
        AdapterNames(model, family), memory.layout, max_adapters=config.max_loaded_loras, device=device
    )


def _may_be_captured(module: FallbackDecoder) -> bool:
    """Whether decode steps of a module of transformers get graphs; says so in the log."""
    obstacle = module.find_capture_obstacle()
    if obstacle is None:
        logger.info("decode steps of transformers' module are captured in CUDA graphs")
    else:
        logger.warning("transformers' module runs without CUDA graphs: %s", obstacle)
    return obstacle is None


def _build_scheduler(
    config: EngineConfig,
    plan: MemoryPlan,
    *,
    host: HostPlan,
    rates: MeasuredRates,
    windows: tuple[int | None, ...],
    kv_fingerprint: str,
    eos_token_ids: frozenset[int],
) -> Scheduler:
    return Scheduler(
        SchedulerLimits(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            enable_prefix_caching=config.enable_prefix_caching,
            max_pinned_blocks=plan_pinned_blocks(config, plan),
        ),
        BlockManager(plan.num_blocks, plan.block_size, windows=windows),
        slots=SlotAllocator(
            plan.num_slots, adapters=AdapterPlaces(config.max_loras if config.serves_lora else 0)
        ),
        eos_token_ids=eos_token_ids,
        host_tier=HostTier(num_swap_blocks=host.num_swap_blocks, num_cache_blocks=host.num_cache_blocks),
        # One process has one model in one format; what else changes KV goes here.
        kv_fingerprint=kv_fingerprint.encode(),
        predictor=rates,
    )


def _build_compiler(
    tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]
) -> StructuredCompiler | None:
    """The compiler of structured outputs, made here because it takes up to a second for large vocabularies.

    None, and such requests are refused, where its library is not installed.
    """
    try:
        from graphllm.structured.compiler import GrammarCompiler
    except ModuleNotFoundError as error:
        if error.name != "llguidance":
            raise
        logger.warning("structured outputs are off: the package llguidance is not installed")
        return None
    return GrammarCompiler(tokenizer, vocab_size=vocab_size, eos_token_ids=eos_token_ids)


def _build_swapper(kv_cache: KVCache, host: HostPlan, *, device: Device) -> BlockSwapper:
    swapper = BlockSwapper(kv_cache, host.num_blocks, device=device)
    if device.torch_device.type == "cuda":
        swapper.compile_copies()
    return swapper


@contextmanager
def memory_errors_explained(what: str) -> Iterator[None]:
    """Turns a card's own word that its memory is full into one that says what to do. Raises ConfigError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"The card's memory does not hold {what}: {str(error).splitlines()[0]} Take a smaller model, end "
            "other processes on the card, or lower --max-num-batched-tokens and --max-num-seqs; "
            "`graphllm plan` says what fits."
        ) from error


def device_capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a card; None on a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _end_token_ids(tokenizer: Tokenizer, vocab_size: int) -> frozenset[int]:
    """The end tokens that the model can produce. Raises CheckpointError for more than the tables hold."""
    producible = frozenset(token_id for token_id in tokenizer.eos_token_ids if token_id < vocab_size)
    if len(producible) > MAX_EOS_TOKEN_IDS:
        raise CheckpointError(
            f"The tokenizer names {len(producible)} end-of-text tokens; at most {MAX_EOS_TOKEN_IDS} "
            "are supported."
        )
    return producible
