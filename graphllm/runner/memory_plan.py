"""How much of what there is: sequence length, step size, slots, KV blocks.

Owns the arithmetic from the user's configuration and the model's shape to a `MemoryPlan`; measures
free memory. Allocates nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from graphllm.cache.kv_cache import KVCacheShape
from graphllm.config import EngineConfig
from graphllm.errors import ConfigError

_GIB = 1024**3
_DEFAULT_KV_FRACTION = 0.25
_DEFAULT_KV_LIMIT = 4 * _GIB
_DEFAULT_CPU_BATCHED_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What the engine works out from the configuration; never written back to it.

    num_slots exceeds max_num_seqs, so that a sequence whose slot still waits behind a fence does
    not keep the next one out. num_blocks counts the null block.
    """

    max_model_len: int
    max_num_batched_tokens: int
    num_slots: int
    num_blocks: int
    block_size: int
    bytes_per_block: int

    @property
    def max_blocks_per_sequence(self) -> int:
        return -(-self.max_model_len // self.block_size)

    @property
    def kv_cache_bytes(self) -> int:
        return self.num_blocks * self.bytes_per_block


def plan_memory(
    config: EngineConfig, kv_shape: KVCacheShape, *, model_context: int, free_bytes: int
) -> MemoryPlan:
    """Fit the KV cache into `free_bytes` (memory left beside the weights).

    Raises ConfigError that says which flag to change and to what.
    """
    max_model_len = config.max_model_len or model_context
    if max_model_len > model_context:
        raise ConfigError(
            f"--max-model-len {max_model_len} is longer than the model's context of {model_context} tokens."
        )
    max_num_batched_tokens = config.max_num_batched_tokens or max(
        _DEFAULT_CPU_BATCHED_TOKENS, config.max_num_seqs
    )
    if max_num_batched_tokens < config.max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens {max_num_batched_tokens} is below --max-num-seqs "
            f"{config.max_num_seqs}: every running sequence must fit in a step."
        )
    # One block beyond a full sequence is the null block; `n` > 1 at full length preempts, but runs.
    fewest_blocks = -(-max_model_len // config.block_size) + 1
    least_bytes = fewest_blocks * kv_shape.bytes_per_block
    asked = config.kv_cache_memory_bytes
    wanted = asked or max(least_bytes, min(_DEFAULT_KV_LIMIT, int(free_bytes * _DEFAULT_KV_FRACTION)))
    if least_bytes > wanted or wanted > free_bytes:
        _refuse(kv_shape, max_model_len, wanted=wanted, least_bytes=least_bytes, free_bytes=free_bytes)
    # Beyond every slot at full length, blocks would never be used.
    most_blocks = config.max_num_seqs * (fewest_blocks - 1) + 1
    return MemoryPlan(
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        num_slots=config.max_num_seqs + max(2, config.max_num_seqs // 8),
        num_blocks=min(wanted // kv_shape.bytes_per_block, most_blocks),
        block_size=config.block_size,
        bytes_per_block=kv_shape.bytes_per_block,
    )


def _refuse(
    kv_shape: KVCacheShape, max_model_len: int, *, wanted: int, least_bytes: int, free_bytes: int
) -> None:
    if least_bytes > wanted and least_bytes <= free_bytes:
        raise ConfigError(
            f"--kv-cache-memory-bytes {wanted} holds {wanted // kv_shape.bytes_per_token} tokens, but one "
            f"sequence of {max_model_len} needs {least_bytes} bytes: raise it, or lower --max-model-len to "
            f"{max(1, wanted // kv_shape.bytes_per_block - 1) * kv_shape.block_size}."
        )
    fitting = (free_bytes // kv_shape.bytes_per_block - 1) * kv_shape.block_size
    raise ConfigError(
        f"The KV cache needs {max(wanted, least_bytes)} bytes and {free_bytes} are free: lower "
        f"--kv-cache-memory-bytes to at most {free_bytes}, and --max-model-len to at most {max(0, fitting)}."
    )


def free_host_bytes() -> int:
    """Memory that this process may still take: the kernel's estimate, within the control group's limit."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        # Cached file pages count as used, a checkpoint's among them, and are given back when needed.
        statistics = dict(
            line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
        )
        cached = int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))
        free = min(free, max(0, int(text) - int(used.read_text()) + cached))
    return free
