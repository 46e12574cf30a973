"""The part of config.json that decoders with experts write alike.

Owns the errors that name a key of the router, and which layers have experts. The families say by which keys.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from graphllm.kernels.moe_routing import MAX_EXPERTS, RoutingRule
from graphllm.layers.moe import MoEConfig
from graphllm.models.config import ModelConfig
from graphllm.models.hf_config import HFConfig


def read_routing(config: HFConfig, *, num_experts: str, **rule: Any) -> RoutingRule:
    """The router's rule: `num_experts` is the key of their number, `rule` the other fields.

    Raises CheckpointError for numbers that cannot be: more experts for a token than there are to choose.
    """
    number, top_k = config.positive_int(num_experts), config.positive_int("num_experts_per_tok")
    if number > MAX_EXPERTS:
        config.refuse(num_experts, f"is {number}; at most {MAX_EXPERTS} experts are supported")
    try:
        return RoutingRule(num_experts=number, top_k=top_k, **rule)
    except ValueError as error:
        config.refuse("num_experts_per_tok", f"is {top_k}, which cannot be: {error}")


def with_experts(base: ModelConfig, moe: MoEConfig, *, layers: Collection[int] | None = None) -> ModelConfig:
    """`base` with a mixture of experts in the layers of these numbers, None for all."""
    changed = (
        replace(layer, moe=moe) if layers is None or number in layers else layer
        for number, layer in enumerate(base.layers)
    )
    return replace(base, layers=tuple(changed))


def read_sparse_layers(config: HFConfig, *, num_layers: int) -> list[int]:
    """Each `decoder_sparse_step`-th layer but for those of `mlp_only_layers`."""
    step = config.positive_int("decoder_sparse_step", 1)
    plain = config.get("mlp_only_layers", [])
    if not isinstance(plain, list) or any(type(number) is not int for number in plain):
        config.refuse("mlp_only_layers", f"is {plain!r}, not a list of layers' numbers")
    return [number for number in range(num_layers) if (number + 1) % step == 0 and number not in plain]


def refuse_windows(config: HFConfig) -> None:
    """For families whose published models have none, whatever sizes the file gives."""
    if config.flag("use_sliding_window", default=False):
        config.refuse("use_sliding_window", "is true, which is not supported")
    for key in ("sliding_window", "max_window_layers"):
        config.get(key)  # of no effect without use_sliding_window
