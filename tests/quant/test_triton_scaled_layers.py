"""Layers in 8 bits in kernels over what is stored, as a card runs them, against plain products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphllm.arena import Arena
from graphllm.kernels.grouped_gemv import grouped_linear_sum_ref
from graphllm.kernels.grouped_linear import grouped_gated_linear_ref
from graphllm.kernels.linear import linear_ref
from graphllm.kernels.moe_routing import RoutingRule
from graphllm.kernels.moe_tiles import RoutedTokens, expert_tiles
from graphllm.layers.linear import Linear
from graphllm.layers.moe import ExpertStack
from graphllm.quant.fp8 import Fp8
from graphllm.quant.scaled import ScaledScheme
from graphllm.quant.scaled_form import ScaledForm, StoredScaled
from tests.kernels.device import DEVICE
from tests.kernels.moe_inputs import empty_tiles, nan_like
from tests.quant.scaled_models import round_activations

pytestmark = pytest.mark.triton

GIVEN = 0.02
IN_FEATURES = 96


def scheme_of(name: str) -> ScaledScheme:
    if name == "online":
        return Fp8(linear_ref)
    if name == "blocks":
        return StoredScaled(ScaledForm(stored="e4m3", scales_of="block", block=(48, 32)), linear_ref)
    form = ScaledForm(stored="int8", scales_of="channel", given_name="input_scale")
    return StoredScaled(form, linear_ref)


def rounded(x: Tensor, scheme: ScaledScheme) -> Tensor:
    given = GIVEN if scheme.has_given_scale else None
    return round_activations(x, scheme.stored, group=scheme.group_size, given=given)


def fill(layer: Linear | ExpertStack, scheme: ScaledScheme) -> Tensor:
    """Random weights; returns what they mean."""
    scheme.fill_random(layer, generator=torch.Generator(DEVICE).manual_seed(0), deviation=0.1)
    if scheme.has_given_scale:
        layer.get_parameter("given_scale").fill_(GIVEN)
    assert layer.plain is None and layer.values.dtype == scheme.stored, "what is stored is multiplied"
    num_rows = len(layer.values)
    return scheme.dequantized_rows(layer, 0, num_rows, dtype=torch.float32)


@pytest.mark.parametrize("name", ["online", "blocks", "int8"])
def test_linear_layers_of_any_step_multiply_what_is_stored(name: str) -> None:
    torch.manual_seed(0)
    scheme = scheme_of(name)
    layer = Linear(IN_FEATURES, {"": 70}, bias=True, scheme=scheme, device=DEVICE, dtype=torch.float32)
    weight = fill(layer, scheme)
    # The largest step fixes all addresses.
    layer(torch.zeros(80, IN_FEATURES, device=DEVICE), arena=Arena(DEVICE), name="out")
    assert scheme._arena is not None
    scheme._arena.seal()
    for num_rows in (1, 20, 80):
        x = torch.randn(num_rows, IN_FEATURES, device=DEVICE)
        out = torch.empty(num_rows, 70, device=DEVICE)
        layer.project(x, out=out)
        torch.testing.assert_close(out, rounded(x, scheme) @ weight.t() + layer.bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [1, 21])
@pytest.mark.parametrize("name", ["online", "blocks", "int8"])
def test_experts_of_any_step_multiply_what_is_stored(name: str, num_tokens: int) -> None:
    torch.manual_seed(0)
    scheme = scheme_of(name)
    num_experts, inner, rule = 4, 40, RoutingRule(num_experts=4, top_k=2, scoring="softmax", normalizes=True)
    gate_up = ExpertStack(
        num_experts,
        IN_FEATURES,
        parts={"gate": inner, "up": inner},
        bias=False,
        scheme=scheme,
        device=DEVICE,
        dtype=torch.float32,
    )
    down = ExpertStack(
        num_experts,
        inner,
        parts={"": IN_FEATURES},
        bias=False,
        scheme=scheme,
        device=DEVICE,
        dtype=torch.float32,
    )
    weights_up = fill(gate_up, scheme).view(num_experts, 2 * inner, IN_FEATURES)
    weights_down = fill(down, scheme).view(num_experts, IN_FEATURES, inner)
    x = torch.randn(num_tokens, IN_FEATURES, device=DEVICE)
    chosen = [torch.randperm(num_experts)[: rule.top_k] for _ in range(num_tokens)]
    experts = torch.stack(chosen).to(dtype=torch.int32, device=DEVICE)
    weights = torch.rand(num_tokens, rule.top_k, device=DEVICE)
    tiles = None
    if num_tokens > 1:
        room = empty_tiles(experts.numel(), num_experts=num_experts, rows_per_tile=16)
        tiles = expert_tiles(experts, num_experts=num_experts, out=room)
    routed = RoutedTokens(experts, weights, tiles)
    activated = nan_like(experts.numel(), inner, dtype=torch.float32)
    scheme.apply_experts_gated(gate_up, x, routed, "silu", out=activated)
    expected = torch.empty_like(activated)
    grouped_gated_linear_ref(rounded(x, scheme), weights_up, None, experts, "silu", out=expected)
    torch.testing.assert_close(activated, expected, rtol=1e-4, atol=1e-4)

    results = None if tiles is None else nan_like(experts.numel(), IN_FEATURES, dtype=torch.float32)
    out, expected_out = nan_like(num_tokens, IN_FEATURES, dtype=torch.float32), torch.empty_like(x)
    scheme.apply_experts(down, activated, routed, None, results=results, out=out)
    rows = rounded(activated, scheme)
    grouped_linear_sum_ref(rows, weights_down, None, experts, weights, None, out=expected_out)
    torch.testing.assert_close(out, expected_out, rtol=1e-4, atol=1e-4)
