"""Puts model, memory, scheduler and runner together from a configuration.

Runs on the device's worker, because reading weights and building a tokenizer take seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tqdm import tqdm

from graphllm.attention.paged import PagedAttention
from graphllm.cache.block_manager import BlockManager
from graphllm.cache.kv_cache import KVCache, KVCacheShape
from graphllm.config import EngineConfig
from graphllm.errors import CheckpointError
from graphllm.models.checkpoint import open_checkpoint, resolve_model_path
from graphllm.models.weights import load_model
from graphllm.runner.device import Device
from graphllm.runner.memory_plan import MemoryPlan, free_host_bytes, plan_memory
from graphllm.runner.model_runner import ModelRunner
from graphllm.runner.sampler import MAX_EOS_TOKEN_IDS
from graphllm.runner.step_buffers import StagingRing, StepBuffers
from graphllm.scheduler.scheduler import Scheduler, SchedulerLimits
from graphllm.scheduler.slots import SlotAllocator
from graphllm.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

tqdm.monitor_interval = 0  # its monitor is a thread

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    checkpoint = open_checkpoint(resolve_model_path(config.model))
    tokenizer = checkpoint.load_tokenizer()
    dtype = _DTYPES.get(config.dtype, torch.float32)  # auto: a CPU without matrix units wants float32
    backend = PagedAttention(block_size=config.block_size)
    with _progress_bar("Loading weights", show=show_progress) as advance:
        model = load_model(
            checkpoint, backend=backend, device=device.torch_device, dtype=dtype, progress=advance
        )
    model_config = model.config
    kv_shape = KVCacheShape(
        num_layers=model_config.num_layers,
        num_kv_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        block_size=config.block_size,
        dtype=dtype,
    )
    plan = plan_memory(
        config,
        kv_shape,
        model_context=model_config.max_position_embeddings,
        free_bytes=free_host_bytes(),
    )
    kv_cache = KVCache(kv_shape, plan.num_blocks, device=device.torch_device)
    eos_token_ids = _end_token_ids(tokenizer, model_config.vocab_size)
    runner = ModelRunner(
        model,
        backend=backend,
        device=device,
        buffers=StepBuffers(
            plan,
            max_num_seqs=config.max_num_seqs,
            vocab_size=model_config.vocab_size,
            device=device.torch_device,
        ),
        staging=StagingRing(plan, max_num_seqs=config.max_num_seqs, device=device),
        kv_cache=kv_cache,
        eos_token_ids=eos_token_ids,
    )
    scheduler = Scheduler(
        SchedulerLimits(max_num_seqs=config.max_num_seqs, max_num_batched_tokens=plan.max_num_batched_tokens),
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


@contextmanager
def _progress_bar(title: str, *, show: bool) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) that draws on standard error; it draws nothing unless `show`."""
    with tqdm(desc=title, unit="tensor", disable=not show, leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance
