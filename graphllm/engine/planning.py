"""`graphllm plan`: what a model and these flags would take on a card that need not be there.

Owns the estimates that stand in for measurements, and how the plan reads. The arithmetic is
`runner/memory_plan.py`'s, the same that a server does at start. Reads config.json or a GGUF header, no
weights, and touches no device.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from graphllm.cache.kv_cache import KVCacheShape, resolve_kv_dtype
from graphllm.config import EngineConfig, PlanConfig, card_capability, parse_card
from graphllm.engine.pooling_limits import limits_of_purpose
from graphllm.errors import ConfigError
from graphllm.models.checkpoint import resolve_model
from graphllm.models.config import ModelConfig, resolve_dtype
from graphllm.models.dummy import DummyCheckpoint
from graphllm.models.fallback_choice import refuse_without_weights
from graphllm.models.pooling import read_pooling
from graphllm.models.quantization import read_quantization
from graphllm.models.registry import find_family, read_model_config
from graphllm.runner.memory_estimate import (
    WeightBytes,
    adapter_bytes,
    estimate_arena_bytes,
    estimate_table_bytes,
    weight_bytes,
)
from graphllm.runner.memory_plan import (
    GIB,
    DeviceMemory,
    MemoryPlan,
    StepLimits,
    plan_device_memory,
    plan_limits,
)

ASSUMED_CONTEXT_BYTES = GIB // 2
"""The CUDA context and the code and workspaces of libraries: an assumption, not measured."""
ASSUMED_GRAPH_BYTES = GIB
"""All captured graphs, the driver's part included: the most that a server gives them, not measured."""

_CONTEXT_LENGTHS = tuple(kilo * 1024 for kilo in (1, 4, 16, 64, 128, 256))
_SHORTEST_CONTEXT = 512
_CONTEXT_TO_SUGGEST_FOR = 4096
_MOST_SUGGESTED_SEQS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityPlan:
    """What fits. `plan` is None, and `refusal` says why, where the flags cannot work on the card.

    adapter_bytes: of the places for LoRA adapters, which the memory's tables have among them.
    quantization: how weights are stored, "" for plain numbers.
    """

    model: str
    gpu: str
    config: EngineConfig
    model_config: ModelConfig
    dtype: torch.dtype
    quantization: str
    weights: WeightBytes
    kv_shape: KVCacheShape
    limits: StepLimits
    memory: DeviceMemory
    adapter_bytes: int
    plan: MemoryPlan | None
    refusal: str | None

    @property
    def kv_bytes(self) -> int:
        """What the KV cache may take."""
        asked = self.config.kv_cache_memory_bytes
        return self.memory.kv_bytes(self.config.gpu_memory_utilization) if asked is None else asked

    @property
    def num_usable_blocks(self) -> int:
        """Blocks that the memory holds, without the null block."""
        return max(0, self.kv_bytes // self.kv_shape.bytes_per_block - 1)

    @property
    def longest_context(self) -> int:
        """The longest sequence that model and memory allow, in tokens."""
        return self.kv_shape.layout.longest_fitting(
            self.num_usable_blocks,
            max_step_tokens=self.limits.max_num_batched_tokens,
            at_most=self.model_config.max_position_embeddings,
        )

    def concurrency(self) -> dict[int, int]:
        """Context length to how many such sequences the KV cache holds at once."""
        longest = self.limits.max_model_len
        lengths = {length for length in (_SHORTEST_CONTEXT, *_CONTEXT_LENGTHS) if length < longest}
        return {length: self.num_sequences(length) for length in sorted(lengths | {longest})}

    def num_sequences(self, length: int) -> int:
        """How many sequences of a length fit at once, one step's worth of prompt among them.

        What a step adds to windows it adds to one sequence at a time, or to several together.
        """
        layout = self.kv_shape.layout
        settled = layout.num_needed(length, num_settled=length - 1)
        most = layout.num_at_most(length, max_step_tokens=self.limits.max_num_batched_tokens)
        return max(0, self.num_usable_blocks - (most - settled)) // settled

    def suggested_flags(self) -> dict[str, int]:
        """Flags whose values should be others on this card."""
        flags = {}
        longest = self.limits.max_model_len
        if self.plan is None and 0 < self.longest_context < longest:
            longest = self.longest_context
            flags["--max-model-len"] = longest
        num_seqs = self.num_sequences(min(longest, _CONTEXT_TO_SUGGEST_FOR))
        fitting = min(_MOST_SUGGESTED_SEQS, 1 << max(0, num_seqs.bit_length() - 1))
        asked = self.config.max_num_seqs
        if self.num_usable_blocks and (fitting > asked or num_seqs < asked // 2):
            flags["--max-num-seqs"] = fitting
        return flags


def plan_capacity(config: EngineConfig, plan_config: PlanConfig) -> CapacityPlan:
    """Plan the model on the card.

    Raises StartupError where there is nothing to plan: a model that is not understood, flags that
    contradict each other or the model.
    """
    if config.device == "cpu":
        raise ConfigError("--device cpu: a plan is of a CUDA device's memory.")
    assert plan_config.gpu is not None
    checkpoint = DummyCheckpoint(resolve_model(config, with_weights=False))
    refuse_without_weights(
        checkpoint, model_impl=config.model_impl, what="`graphllm plan` knows the memory of"
    )
    family = find_family(checkpoint)
    model_config = read_model_config(checkpoint, family)
    pooling = read_pooling(checkpoint, family, model_config)
    model_config, config = limits_of_purpose(config, model_config, pooling, device_type="cuda")
    dtype = resolve_dtype(config.dtype, model_config.dtype, device_type="cuda")
    limits = plan_limits(config, model_context=model_config.max_position_embeddings, device_type="cuda")
    kv_shape = model_config.kv_cache_shape(
        block_size=config.block_size,
        dtype=resolve_kv_dtype(config.kv_cache_dtype, dtype, capability=card_capability(plan_config.gpu)),
        max_model_len=limits.max_model_len,
    )
    quantization = read_quantization(checkpoint, asked=config.quantization)
    quantization.check_device(device_type="cuda", capability=card_capability(plan_config.gpu))
    weights = weight_bytes(model_config, dtype, quantization=quantization)
    total_bytes = parse_card(plan_config.gpu)
    free_bytes_at_start = total_bytes - ASSUMED_CONTEXT_BYTES
    places = 0
    if config.serves_lora:
        rank = config.max_lora_rank
        places = adapter_bytes(model_config, dtype, max_loras=config.max_loras, max_rank=rank)
    memory = DeviceMemory(
        total_bytes=total_bytes,
        free_bytes_at_start=free_bytes_at_start,
        free_bytes_after_weights=free_bytes_at_start - weights.total,
        arena_bytes=estimate_arena_bytes(
            model_config, dtype, limits=limits, max_num_seqs=config.max_num_seqs
        ),
        table_bytes=places + estimate_table_bytes(model_config, limits, max_num_seqs=config.max_num_seqs),
        graph_bytes=0 if config.enforce_eager else ASSUMED_GRAPH_BYTES,
    )
    plan, refusal = None, None
    try:
        plan = plan_device_memory(config, kv_shape, limits=limits, memory=memory)
    except ConfigError as error:
        refusal = error.message
    return CapacityPlan(
        model=config.model,
        gpu=plan_config.gpu,
        config=config,
        model_config=model_config,
        dtype=dtype,
        quantization=quantization.description,
        weights=weights,
        kv_shape=kv_shape,
        limits=limits,
        memory=memory,
        adapter_bytes=places,
        plan=plan,
        refusal=refusal,
    )


def as_json(capacity: CapacityPlan) -> dict[str, Any]:
    """The plan for machines; sizes in bytes, lengths in tokens."""
    memory, limits = capacity.memory, capacity.limits
    return {
        "model": capacity.model,
        "gpu": capacity.gpu,
        "dtype": _name(capacity.dtype),
        "quantization": capacity.quantization or None,
        "fits": capacity.plan is not None,
        "reason": capacity.refusal,
        "total_bytes": memory.total_bytes,
        "gpu_memory_utilization": capacity.config.gpu_memory_utilization,
        "context_bytes_assumed": memory.other_bytes,
        "weight_bytes": dataclasses.asdict(capacity.weights) | {"total": capacity.weights.total},
        "arena_bytes_estimated": memory.arena_bytes,
        "table_bytes_estimated": memory.table_bytes - capacity.adapter_bytes,
        "adapter_bytes": capacity.adapter_bytes,
        "graph_bytes_assumed": memory.graph_bytes,
        "kv_cache_bytes": max(0, capacity.kv_bytes),
        "kv_dtype": _name(capacity.kv_shape.dtype),
        "kv_bytes_per_token": capacity.kv_shape.bytes_per_token,
        "kv_groups": [
            {"layers": len(layers), "sliding_window": window}
            for window, layers in zip(
                capacity.kv_shape.groups.windows, capacity.kv_shape.groups.layers, strict=True
            )
        ],
        "block_size": capacity.kv_shape.block_size,
        "num_usable_blocks": 0 if capacity.plan is None else capacity.plan.num_blocks - 1,
        "max_model_len": limits.max_model_len,
        "max_num_seqs": capacity.config.max_num_seqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        "longest_context": capacity.longest_context,
        "concurrency": {str(length): count for length, count in capacity.concurrency().items()},
        "suggested_flags": capacity.suggested_flags(),
    }


def as_text(capacity: CapacityPlan) -> str:
    """The plan for people."""
    memory = capacity.memory
    lines = [
        f"{capacity.model} on {capacity.gpu} ({memory.total_bytes / GIB:.1f} GiB), {_name(capacity.dtype)}",
        "",
        *_memory_lines(capacity),
        "",
        f"longest context   {capacity.longest_context:,} tokens; the model's is "
        f"{capacity.model_config.max_position_embeddings:,}",
        "",
        f"{'context, tokens':>17}  sequences at once",
        *(f"{length:>17,}  {count:>17,}" for length, count in capacity.concurrency().items()),
        f"A step takes at most {capacity.config.max_num_seqs} of them (--max-num-seqs).",
    ]
    if capacity.refusal is not None:
        lines += ["", f"Does not fit. {capacity.refusal}"]
    if flags := capacity.suggested_flags():
        lines += ["", "suggested flags: " + " ".join(f"{name} {value}" for name, value in flags.items())]
    return "\n".join(lines)


def _memory_lines(capacity: CapacityPlan) -> list[str]:
    memory, weights, limits = capacity.memory, capacity.weights, capacity.limits
    kv_shape = capacity.kv_shape
    may_use = int(memory.total_bytes * capacity.config.gpu_memory_utilization)
    per_token = f"{kv_shape.bytes_per_token / 1024:,.1f} KiB a token in {_name(kv_shape.dtype)}"
    if kv_shape.layout.windowed:
        share = len(kv_shape.layout.full_groups) * kv_shape.bytes_per_block / kv_shape.block_size
        per_token += f", {share / 1024:,.1f} KiB beyond windows"
    rows = [
        ("may be in use", may_use, f"--gpu-memory-utilization {capacity.config.gpu_memory_utilization:g}"),
        ("CUDA context", memory.other_bytes, "assumed; other processes' part comes on top"),
        ("weights", weights.total, capacity.quantization),
        ("  embedding", weights.embedding, ""),
        ("  attention", weights.attention, ""),
        ("  feed-forward", weights.feed_forward, ""),
        ("  norms", weights.norms, f"{weights.norms / 1024**2:.2f} MiB"),
        ("  head", weights.head, "" if weights.head else _no_head_of_its_own(capacity.model_config)),
        ("largest step", memory.arena_bytes, f"estimated, {limits.max_num_batched_tokens:,} tokens"),
        (
            "step tables",
            memory.table_bytes - capacity.adapter_bytes,
            f"estimated, {limits.num_slots} slots",
        ),
        ("adapters", capacity.adapter_bytes, _adapters_note(capacity.config)),
        ("CUDA graphs", memory.graph_bytes, "assumed, not measured" if memory.graph_bytes else "none"),
        ("KV cache", max(0, capacity.kv_bytes), per_token),
    ]
    lines = [f"{name:<16} {num_bytes / GIB:>9.2f} GiB  {note}".rstrip() for name, num_bytes, note in rows]
    if capacity.plan is not None:
        num_blocks = capacity.plan.num_blocks - 1
        blocks = f"{num_blocks:>9,} blocks of {kv_shape.block_size} tokens"
        groups = kv_shape.groups
        if kv_shape.layout.windowed:
            blocks += f" and {groups.size} layers, in {groups.num_groups} groups of layers"
        else:
            blocks += f", {num_blocks * kv_shape.block_size:,} tokens in all"
        lines.append(f"{'':<16} {blocks}")
    return lines


def _adapters_note(config: EngineConfig) -> str:
    if not config.serves_lora:
        return "none (--enable-lora)"
    return f"--max-loras {config.max_loras} of --max-lora-rank {config.max_lora_rank}"


def _no_head_of_its_own(config: ModelConfig) -> str:
    return "the embedding's" if config.has_head else "none; the model gives no tokens"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
