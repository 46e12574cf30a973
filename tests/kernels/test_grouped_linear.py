"""The experts' products against each pair computed by itself, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from graphllm.kernels.expert_activation import ClampedSwiGLU, ExpertActivation
from graphllm.kernels.grouped_gemv import grouped_linear_sum_gemv, takes_gemv
from graphllm.kernels.grouped_linear import grouped_gated_linear, grouped_linear
from graphllm.kernels.moe_sum import SharedPart, moe_sum
from tests.kernels.moe_inputs import MoEInputs, amid_nan, moe_inputs, nan_like

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
CLAMPED = ClampedSwiGLU(alpha=1.702, limit=0.7)


def inputs(dtype: torch.dtype, *, has_bias: bool) -> MoEInputs:
    torch.manual_seed(0)
    return moe_inputs(
        num_tokens=9, top_k=3, num_experts=5, hidden=18, intermediate=11, dtype=dtype, has_bias=has_bias
    )


def activated(gate: float, up: float, activation: ExpertActivation) -> float:
    if isinstance(activation, ClampedSwiGLU):
        gate = min(gate, activation.limit)
        up = max(-activation.limit, min(up, activation.limit))
        return (up + 1) * gate / (1 + math.exp(-activation.alpha * gate))
    return gate / (1 + math.exp(-gate)) * up


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", CLAMPED])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gates_and_factors_of_each_pair(
    dtype: torch.dtype, activation: ExpertActivation, has_bias: bool
) -> None:
    given = inputs(dtype, has_bias=has_bias)
    out = nan_like(27, 11, dtype=dtype)
    found = grouped_gated_linear(
        given.x,
        given.gate_up,
        given.gate_up_bias,
        given.experts,
        activation,
        tiles=given.tiles,
        out=out,
    )
    assert found is out
    for pair, expert in enumerate(given.experts.flatten().tolist()):
        if expert < 0:
            assert out[pair].isnan().all(), "the rows of padding are left alone"
            continue
        sums = given.gate_up[expert].double() @ given.x[pair // 3].double()
        if given.gate_up_bias is not None:
            sums += given.gate_up_bias[expert].double()
        gates, ups = sums[:11].tolist(), sums[11:].tolist()
        for gate, up, value in zip(gates, ups, out[pair].tolist(), strict=True):
            assert value == pytest.approx(
                activated(gate, up, activation), rel=TOLERANCE[dtype], abs=TOLERANCE[dtype]
            )


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shared", [None, "plain", "gated"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_weighted_results_of_a_token_and_the_shared_part_are_added(
    dtype: torch.dtype, shared: str | None, has_bias: bool
) -> None:
    given = inputs(dtype, has_bias=has_bias)
    inner = amid_nan(27, 11, dtype=dtype)
    output, logits = amid_nan(9, 18, dtype=dtype), torch.randn(9, 6)
    part = SharedPart(output, logits if shared == "gated" else None) if shared else None
    expected = torch.zeros(9, 18, dtype=torch.float64)
    for pair, expert in enumerate(given.experts.flatten().tolist()):
        if expert >= 0:
            sums = given.down[expert].double() @ inner[pair].double()
            if given.down_bias is not None:
                sums += given.down_bias[expert].double()
            expected[pair // 3] += given.weights.flatten()[pair].double() * sums
    if shared is not None:
        expected += output.double() * (logits[:, -1:].double().sigmoid() if shared == "gated" else 1.0)

    weights = (given.down, given.down_bias, given.experts, given.weights)
    results = grouped_linear(inner, *weights, tiles=given.tiles, out=nan_like(27, 18, dtype=dtype))
    assert results[-3:].isnan().all(), "the rows of padding are left alone"
    apart = moe_sum(results, given.experts, part, out=nan_like(9, 18, dtype=dtype))
    # The sum may take the place of the shared output.
    in_one = grouped_linear_sum_gemv(inner, *weights, part, out=output)
    for found in (apart, in_one):
        torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] / 2)


def test_pairs_go_one_by_one_where_hardly_two_tokens_share_an_expert() -> None:
    assert takes_gemv(1, top_k=2, num_experts=8)
    assert not takes_gemv(2, top_k=2, num_experts=8)
    assert takes_gemv(4, top_k=8, num_experts=128)
    assert not takes_gemv(5, top_k=8, num_experts=128)
    assert not takes_gemv(5, top_k=1, num_experts=128)
