"""How much of what there is: sequence length, step size, slots, KV blocks.

Owns the arithmetic from the user's configuration and the model's shape to a `MemoryPlan`, and the
refusals that say what to change and by how much. What is measured comes in as numbers, so that
`graphllm plan` does the same arithmetic with estimates. Allocates nothing.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from pathlib import Path

from graphllm.cache.kv_cache import KVCacheShape
from graphllm.config import EngineConfig
from graphllm.errors import ConfigError

GIB = 1024**3
_DEFAULT_KV_FRACTION = 0.25
_DEFAULT_KV_LIMIT = 4 * GIB
_DEFAULT_SWAP_GIB = {"cpu": 0.0, "cuda": 4.0}
_DEFAULT_BATCHED_TOKENS = {"cpu": 256, "cuda": 2048}
# Prompt tokens are scored in slices of so many lines of logits, unless the sampler has more of them: few
# enough to cost little memory, enough that a step of thousands of tokens takes few launches.
_LEAST_LOGIT_LINES = 128
# Above this share of the device's memory nobody is advised to go: the driver and libraries need some.
_LARGEST_ADVISED_UTILIZATION = 0.97


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """What bounds a step; known before the memory is.

    num_slots exceeds max_num_seqs, so that a sequence whose slot still waits behind a fence does
    not keep the next one out.
    """

    max_model_len: int
    max_num_batched_tokens: int
    num_slots: int
    block_size: int

    @property
    def max_blocks_per_sequence(self) -> int:
        """Columns of the longest sequence."""
        return -(-self.max_model_len // self.block_size)

    @property
    def table_width(self) -> int:
        """Entries of a row of a block table: no less, and 16 bytes of int32 at a time, so that a kernel finds
        each group's tables aligned alike."""
        return -(-self.max_blocks_per_sequence // 4) * 4


def num_logit_lines(limits: StepLimits, max_num_seqs: int) -> int:
    """Rows of logits that a step has memory for: sampled ones, and then slices of scored prompt tokens."""
    return max(max_num_seqs, min(_LEAST_LOGIT_LINES, limits.max_num_batched_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan(StepLimits):
    """What the engine works out from the configuration; never written back to it.

    num_blocks counts the null block. most_blocks_of_a_sequence: what the longest one holds at once, in all
    groups of layers.
    """

    num_blocks: int
    most_blocks_of_a_sequence: int
    bytes_per_block: int

    @property
    def kv_cache_bytes(self) -> int:
        return self.num_blocks * self.bytes_per_block


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """What is known of an accelerator's memory when the KV cache is planned, in bytes.

    free_bytes_at_start: before the weights came; what is then in use belongs to other processes and to
    the device's own libraries. free_bytes_after_weights: with the weights there and none of the
    following. arena_bytes: intermediates of the largest step. table_bytes: slot tables and logits.
    graph_bytes: what all captured graphs will take. The last three are still to come, so they are taken
    off what is free.
    """

    total_bytes: int
    free_bytes_at_start: int
    free_bytes_after_weights: int
    arena_bytes: int
    table_bytes: int = 0
    graph_bytes: int = 0

    @property
    def other_bytes(self) -> int:
        """In use before the weights came."""
        return self.total_bytes - self.free_bytes_at_start

    @property
    def weight_bytes(self) -> int:
        return self.free_bytes_at_start - self.free_bytes_after_weights

    @property
    def reserved_bytes(self) -> int:
        """What is still to come beside the KV cache."""
        return self.arena_bytes + self.table_bytes + self.graph_bytes

    @property
    def most_kv_bytes(self) -> int:
        """All that is left for the KV cache on the device; below 0 when nothing is."""
        return self.free_bytes_after_weights - self.reserved_bytes

    def kv_bytes(self, utilization: float) -> int:
        """What is left when so large a share of the device may be in use; below 0 when nothing is."""
        return self.most_kv_bytes - math.ceil(self.total_bytes * (1.0 - utilization))


def plan_limits(config: EngineConfig, *, model_context: int, device_type: str) -> StepLimits:
    """The limits of a step on a device of this type ("cpu", "cuda"). Raises ConfigError."""
    max_model_len = config.max_model_len or model_context
    if max_model_len > model_context:
        raise ConfigError(
            f"--max-model-len {max_model_len} is longer than the model's context of {model_context} tokens."
        )
    max_num_batched_tokens = config.max_num_batched_tokens or max(
        _DEFAULT_BATCHED_TOKENS[device_type], config.max_num_seqs
    )
    if max_num_batched_tokens < config.max_num_seqs:
        raise ConfigError(
            f"--max-num-batched-tokens {max_num_batched_tokens} is below --max-num-seqs "
            f"{config.max_num_seqs}: every running sequence must fit in a step."
        )
    return StepLimits(
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        num_slots=config.max_num_seqs + max(2, config.max_num_seqs // 8),
        block_size=config.block_size,
    )


def plan_memory(
    config: EngineConfig, kv_shape: KVCacheShape, *, model_context: int, free_bytes: int
) -> MemoryPlan:
    """Fit the KV cache into a host's `free_bytes` (memory left beside the weights).

    Raises ConfigError that says which flag to change and to what.
    """
    limits = plan_limits(config, model_context=model_context, device_type="cpu")
    least_bytes = _least_bytes(limits, kv_shape)
    asked = config.kv_cache_memory_bytes
    # Nobody asked for more than what runs at once and, in the prefix cache, as much again.
    most_bytes = 2 * _most_running_blocks(config, limits, kv_shape=kv_shape) * kv_shape.bytes_per_block
    default = min(_DEFAULT_KV_LIMIT, int(free_bytes * _DEFAULT_KV_FRACTION), most_bytes)
    wanted = asked or max(least_bytes, default)
    if asked is not None and asked < least_bytes <= free_bytes:
        raise _asked_too_little(asked, limits, kv_shape=kv_shape)
    if max(wanted, least_bytes) > free_bytes:
        raise ConfigError(
            f"The KV cache needs {_gib(max(wanted, least_bytes))} and {_gib(free_bytes)} are free: lower "
            f"--kv-cache-memory-bytes to at most {max(0, free_bytes)}, and --max-model-len to at most "
            f"{_fitting_tokens(free_bytes, limits, kv_shape=kv_shape)} tokens."
        )
    return _plan(config, limits, kv_shape=kv_shape, kv_bytes=wanted)


def plan_device_memory(
    config: EngineConfig, kv_shape: KVCacheShape, *, limits: StepLimits, memory: DeviceMemory
) -> MemoryPlan:
    """Fit the KV cache into what `--gpu-memory-utilization` leaves, or as `--kv-cache-memory-bytes` says.

    Raises ConfigError that says which flags to change and to what.
    """
    asked = config.kv_cache_memory_bytes
    kv_bytes = memory.kv_bytes(config.gpu_memory_utilization) if asked is None else asked
    if asked is not None and asked > memory.most_kv_bytes:
        raise ConfigError(
            f"--kv-cache-memory-bytes {asked} ({_gib(asked)}) is more than is left: {_account(memory)}. "
            f"Lower it to at most {max(0, memory.most_kv_bytes)}."
        )
    least_bytes = _least_bytes(limits, kv_shape)
    if asked is not None and asked < least_bytes:
        raise _asked_too_little(asked, limits, kv_shape=kv_shape)
    if kv_bytes < least_bytes:
        share = f"--gpu-memory-utilization {config.gpu_memory_utilization:g}"
        raise ConfigError(
            f"Out of memory: one sequence of {limits.max_model_len} tokens needs a KV cache of "
            f"{_gib(least_bytes)}, and {share} leaves {_gib(max(0, kv_bytes))}: {_account(memory)}. "
            + _advice(config, limits, kv_shape=kv_shape, memory=memory)
        )
    return _plan(config, limits, kv_shape=kv_shape, kv_bytes=kv_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPlan:
    """Blocks of host memory beside the KV cache: for preempted sequences, and for cold prefixes."""

    num_swap_blocks: int
    num_cache_blocks: int

    @property
    def num_blocks(self) -> int:
        return self.num_swap_blocks + self.num_cache_blocks


def plan_host(config: EngineConfig, kv_shape: KVCacheShape, *, device_type: str, free_bytes: int) -> HostPlan:
    """Turn `--swap-space` and `--kv-offloading-size` into blocks. free_bytes: of the host, still to be had.

    Raises ConfigError for more than there is, or too little for a single block.
    """
    swap_gib = _DEFAULT_SWAP_GIB[device_type] if config.swap_space is None else config.swap_space
    counts = {}
    for flag, gib in (("--swap-space", swap_gib), ("--kv-offloading-size", config.kv_offloading_size)):
        counts[flag] = int(gib * GIB) // kv_shape.bytes_per_block
        if gib and not counts[flag]:
            raise ConfigError(
                f"{flag} {gib:g} is less than one KV block of {kv_shape.bytes_per_block} bytes: raise it, or "
                "set it to 0."
            )
    wanted = sum(counts.values()) * kv_shape.bytes_per_block
    if wanted > max(0, free_bytes):
        if config.swap_space is None and not config.kv_offloading_size:
            # Nobody asked for it: as much as leaves the host half of what it has.
            return HostPlan(
                num_swap_blocks=max(0, free_bytes // 2 // kv_shape.bytes_per_block), num_cache_blocks=0
            )
        raise ConfigError(
            f"--swap-space and --kv-offloading-size want {_gib(wanted)} of host memory together, and "
            f"{_gib(max(0, free_bytes))} are free: lower them."
        )
    return HostPlan(num_swap_blocks=counts["--swap-space"], num_cache_blocks=counts["--kv-offloading-size"])


def plan_pinned_blocks(config: EngineConfig, plan: MemoryPlan) -> int:
    """How many blocks pinned prefixes may hold: their share, and never the longest sequence's room."""
    num_usable_blocks = plan.num_blocks - 1
    share = int(config.max_pinned_share * num_usable_blocks)
    return max(0, min(share, num_usable_blocks - plan.most_blocks_of_a_sequence))


def _plan(config: EngineConfig, limits: StepLimits, *, kv_shape: KVCacheShape, kv_bytes: int) -> MemoryPlan:
    num_blocks = kv_bytes // kv_shape.bytes_per_block
    if not config.enable_prefix_caching:
        # Beyond every sequence at full length, blocks would never be used.
        num_blocks = min(num_blocks, _most_running_blocks(config, limits, kv_shape=kv_shape))
    return MemoryPlan(
        **{field.name: getattr(limits, field.name) for field in fields(limits)},
        num_blocks=num_blocks,
        most_blocks_of_a_sequence=_most_blocks(limits, kv_shape),
        bytes_per_block=kv_shape.bytes_per_block,
    )


def _most_blocks(limits: StepLimits, kv_shape: KVCacheShape) -> int:
    """What a sequence at full length takes at the most."""
    return kv_shape.layout.num_at_most(limits.max_model_len, max_step_tokens=limits.max_num_batched_tokens)


def _most_running_blocks(config: EngineConfig, limits: StepLimits, *, kv_shape: KVCacheShape) -> int:
    """What every sequence at full length takes, and the null block."""
    return config.max_num_seqs * _most_blocks(limits, kv_shape) + 1


def _least_bytes(limits: StepLimits, kv_shape: KVCacheShape) -> int:
    """A full sequence and the null block; `n` > 1 at full length preempts, but runs."""
    return (_most_blocks(limits, kv_shape) + 1) * kv_shape.bytes_per_block


def _fitting_tokens(kv_bytes: int, limits: StepLimits, *, kv_shape: KVCacheShape) -> int:
    """The longest sequence that so much memory holds, in whole blocks."""
    return kv_shape.layout.longest_fitting(
        max(0, kv_bytes // kv_shape.bytes_per_block - 1),
        max_step_tokens=limits.max_num_batched_tokens,
        at_most=limits.max_model_len,
    )


def _asked_too_little(asked: int, limits: StepLimits, *, kv_shape: KVCacheShape) -> ConfigError:
    least_bytes = _least_bytes(limits, kv_shape)
    tokens = _fitting_tokens(asked, limits, kv_shape=kv_shape)
    advice = f", or lower --max-model-len to at most {tokens}" if tokens else ""
    return ConfigError(
        f"--kv-cache-memory-bytes {asked} ({_gib(asked)}) holds {tokens} tokens, but one sequence of "
        f"{limits.max_model_len} needs {_gib(least_bytes)}: raise it to at least {least_bytes}{advice}."
    )


def _account(memory: DeviceMemory) -> str:
    """Where the device's memory goes, in words."""
    parts = [f"{_gib(memory.weight_bytes)} are weights", f"{_gib(memory.arena_bytes)} the largest step's"]
    if memory.table_bytes:
        parts.append(f"{_gib(memory.table_bytes)} slot tables and logits")
    if memory.graph_bytes:
        parts.append(f"{_gib(memory.graph_bytes)} graphs")
    parts.append(f"{_gib(memory.other_bytes)} were in use before")
    return f"of {_gib(memory.total_bytes)}, " + ", ".join(parts)


def _advice(config: EngineConfig, limits: StepLimits, *, kv_shape: KVCacheShape, memory: DeviceMemory) -> str:
    """Each single change that would do, with its number."""
    kv_bytes = memory.kv_bytes(config.gpu_memory_utilization)
    missing = _least_bytes(limits, kv_shape) - kv_bytes
    changes = []
    if tokens := _fitting_tokens(kv_bytes, limits, kv_shape=kv_shape):
        fewer = limits.max_model_len - tokens
        changes.append(f"lower --max-model-len to at most {tokens} ({fewer} tokens fewer)")
    bytes_per_step_token = memory.arena_bytes / limits.max_num_batched_tokens
    if 0 < missing < memory.arena_bytes:
        step_tokens = int((memory.arena_bytes - missing) / bytes_per_step_token)
        if step_tokens >= config.max_num_seqs:
            changes.append(f"lower --max-num-batched-tokens to about {step_tokens}")
    utilization = math.ceil((config.gpu_memory_utilization + missing / memory.total_bytes) * 100) / 100
    if utilization <= _LARGEST_ADVISED_UTILIZATION:
        changes.append(f"raise --gpu-memory-utilization to at least {utilization:.2f}")
    if not changes:
        changes.append("that is more than any flag can give: take a smaller model or a larger device")
    return f"{_gib(missing)} are missing: {'; or '.join(changes)}."


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


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
