"""Puts model, memory, scheduler and runner together from a configuration.

Runs on the device's worker, because reading weights and building a tokenizer take seconds.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from graphllm.arena import Arena
from graphllm.cache.block_manager import BlockManager
from graphllm.cache.kv_cache import KVCache, KVCacheShape
from graphllm.config import EngineConfig
from graphllm.engine.progress import progress_bar
from graphllm.errors import CheckpointError
from graphllm.models.checkpoint import open_model, resolve_model_path
from graphllm.models.config import resolve_dtype
from graphllm.models.registry import find_family, read_model_config
from graphllm.models.weights import load_model
from graphllm.runner.assembly import assemble_step, choose_backend, measure_largest_step
from graphllm.runner.compilation import AheadCompilation
from graphllm.runner.device import Device
from graphllm.runner.memory_plan import (
    DeviceMemory,
    MemoryPlan,
    free_host_bytes,
    plan_device_memory,
    plan_limits,
    plan_memory,
)
from graphllm.runner.model_runner import ModelRunner
from graphllm.runner.sampler import MAX_EOS_TOKEN_IDS
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
    vocab_size: int


def load(config: EngineConfig, device: Device, *, show_progress: bool) -> LoadedModel:
    """Read the checkpoint, plan memory, allocate it. Raises StartupError."""
    checkpoint = open_model(resolve_model_path(config.model), config.load_format)
    tokenizer = checkpoint.load_tokenizer()
    model_config = read_model_config(checkpoint, find_family(checkpoint))
    torch_device = device.torch_device
    dtype = resolve_dtype(config.dtype, model_config.dtype, device_type=torch_device.type)
    limits = plan_limits(
        config, model_context=model_config.max_position_embeddings, device_type=torch_device.type
    )
    arena = Arena(torch_device)
    backend = choose_backend(config, limits, device, arena=arena)
    free_at_start = 0 if device.graphs is None else device.graphs.free_bytes()
    ahead = AheadCompilation(config) if torch_device.type == "cuda" else None
    with progress_bar("Loading weights", "tensor", show=show_progress) as advance:
        model = load_model(checkpoint, backend=backend, device=torch_device, dtype=dtype, progress=advance)
    if ahead is not None:
        ahead.wait()
    kv_shape = KVCacheShape(
        num_layers=model_config.num_layers,
        num_kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        block_size=config.block_size,
        dtype=dtype,
    )
    if device.graphs is None:
        parts = assemble_step(config, limits, device, model=model, arena=arena)
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
        parts = assemble_step(config, limits, device, model=model, arena=arena)
        measured = measure_largest_step(parts, kv_shape, graphs_enabled=not config.enforce_eager)
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
    graphs = parts.graphs(program, enabled=not config.enforce_eager, max_bytes=graph_bytes)
    runner = parts.runner(program, graphs, limits=limits, kv_cache=kv_cache, eos_token_ids=eos_token_ids)
    scheduler = Scheduler(
        SchedulerLimits(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
        ),
        BlockManager(plan.num_blocks, plan.block_size),
        slots=SlotAllocator(plan.num_slots),
        eos_token_ids=eos_token_ids,
    )
    logger.info(
        "%s: %s, context %d, %d KV blocks of %d tokens (%.2f GiB)",
        config.model,
        str(dtype).removeprefix("torch."),
        plan.max_model_len,
        plan.num_blocks - 1,
        plan.block_size,
        plan.kv_cache_bytes / 1024**3,
    )
    return LoadedModel(tokenizer, plan, scheduler, runner, model_config.vocab_size)


def _end_token_ids(tokenizer: Tokenizer, vocab_size: int) -> frozenset[int]:
    """The end tokens that the model can produce. Raises CheckpointError for more than the tables hold."""
    producible = frozenset(token_id for token_id in tokenizer.eos_token_ids if token_id < vocab_size)
    if len(producible) > MAX_EOS_TOKEN_IDS:
        raise CheckpointError(
            f"The tokenizer names {len(producible)} end-of-text tokens; at most {MAX_EOS_TOKEN_IDS} "
            "are supported."
        )
    return producible
