"""The whole layer in kernels, as a captured step runs it, against the same layer by references."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from graphllm.arena import Arena
from graphllm.kernels.expert_activation import ClampedSwiGLU
from graphllm.kernels.gated_linear import gated_linear_ref
from graphllm.kernels.grouped_gemv import grouped_linear_sum_ref
from graphllm.kernels.grouped_linear import grouped_gated_linear_ref
from graphllm.kernels.linear import linear_ref
from graphllm.kernels.moe_routing import RoutingRule, moe_routing_ref
from graphllm.kernels.moe_sum import SharedPart
from graphllm.layers.moe import MoE, MoEConfig
from graphllm.models.dummy import fill_random
from graphllm.quant.scheme_source import one_scheme
from graphllm.quant.unquantized import Unquantized
from tests.kernels.device import DEVICE

pytestmark = pytest.mark.triton

HIDDEN, INNER = 48, 20
ARENA_NAMES = {
    "router_logits",
    "experts",
    "expert_weights",
    "inner",
    "wide",
    "delta",
    "tile_experts",
    "tile_pairs",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "experts alone": {},
    "a gated shared expert": {"shared_intermediate_size": 24, "has_shared_gate": True},
    "biases, groups and a shared expert": {
        "routing": RoutingRule(
            num_experts=8,
            top_k=2,
            scoring="sigmoid",
            normalizes=True,
            scale=2.0,
            num_groups=4,
            num_chosen_groups=2,
        ),
        "expert_activation": ClampedSwiGLU(alpha=1.7, limit=0.5),
        "expert_bias": True,
        "router_bias": True,
        "has_selection_bias": True,
        "shared_intermediate_size": 24,
    },
}


def layer_of(variant: str) -> MoE:
    settings: dict[str, Any] = {
        "routing": RoutingRule(num_experts=8, top_k=2, scoring="softmax", normalizes=True),
        "expert_intermediate_size": INNER,
        "expert_activation": "silu",
    }
    config = MoEConfig(**(settings | VARIANTS[variant]))
    scheme = Unquantized(linear_ref)
    layer = MoE(HIDDEN, config, schemes=one_scheme(scheme), device=DEVICE, dtype=torch.float32)
    fill_random(layer, seed=0)
    for parameter in layer.parameters():
        parameter.mul_(15.0)
    return layer


def by_references(layer: MoE, x: Tensor, slot_mapping: Tensor) -> Tensor:
    config, num_tokens = layer.config, len(x)
    routing = config.routing

    def weights_of(module: torch.nn.Module, *size: int) -> tuple[Tensor, Tensor | None]:
        bias = None if module.bias is None else module.bias.view(*size)
        return module.weight.view(*size, module.in_features), bias

    num_logits = layer.router.out_features
    logits = linear_ref(x, *weights_of(layer.router, num_logits), x.new_empty(num_tokens, num_logits))
    experts = torch.empty(num_tokens, routing.top_k, dtype=torch.int32, device=DEVICE)
    weights = x.new_empty(num_tokens, routing.top_k)
    bias = None if layer.selection is None else layer.selection.bias
    moe_routing_ref(logits, bias, slot_mapping, rule=routing, experts=experts, weights=weights)
    shared = None
    if layer.shared is not None:
        inner = x.new_empty(num_tokens, layer.shared.intermediate_size)
        gated_linear_ref(x, layer.shared.gate_up.weight, None, "silu", out=inner)
        output = inner @ layer.shared.down.weight.t()
        shared = SharedPart(output, logits if config.has_shared_gate else None)
    activated = x.new_zeros(experts.numel(), INNER)
    gate_up = weights_of(layer.gate_up, routing.num_experts, 2 * INNER)
    grouped_gated_linear_ref(x, *gate_up, experts, config.expert_activation, out=activated)
    down = weights_of(layer.down, routing.num_experts, HIDDEN)
    return grouped_linear_sum_ref(activated, *down, experts, weights, shared, out=torch.empty_like(x))


@pytest.mark.parametrize("num_tokens", [1, 2, 21])
@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_in_kernels_is_the_layer_of_the_references(variant: str, num_tokens: int) -> None:
    torch.manual_seed(0)
    layer, arena = layer_of(variant), Arena(DEVICE)
    x = torch.randn(num_tokens, HIDDEN, device=DEVICE)
    slot_mapping = torch.arange(num_tokens, device=DEVICE)
    out = layer(x, slot_mapping=slot_mapping, arena=arena)
    torch.testing.assert_close(out, by_references(layer, x, slot_mapping), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_padded_step_takes_what_the_largest_took_and_gives_its_tokens_the_same(variant: str) -> None:
    torch.manual_seed(0)
    layer, arena = layer_of(variant), Arena(DEVICE)
    x = torch.randn(12, HIDDEN, device=DEVICE)
    slot_mapping = torch.arange(12, device=DEVICE)
    slot_mapping[7:] = -1
    # The largest step, on padding alone, fixes all addresses.
    layer(torch.zeros(24, HIDDEN, device=DEVICE), slot_mapping=torch.full((24,), -1), arena=arena)
    arena.seal()
    assert arena._buffers.keys() == ARENA_NAMES
    expected = by_references(layer, x, slot_mapping)
    x[7:] = math.nan
    for buffer in arena._buffers.values():
        buffer.fill_(0xFF)  # NaN in every format, -1 in integers
    out = layer(x, slot_mapping=slot_mapping, arena=arena)
    torch.testing.assert_close(out[:7], expected[:7], rtol=1e-4, atol=1e-5)
    if layer.shared is None:
        assert (out[7:] == 0).all(), "padding gets nothing, whatever its hidden state is"
