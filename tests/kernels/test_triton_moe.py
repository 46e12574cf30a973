"""The kernels of a mixture of experts against their references: interpreted, or compiled on a card."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from graphllm.kernels.expert_activation import ClampedSwiGLU, ExpertActivation
from graphllm.kernels.grouped_gemv import (
    grouped_gated_gemv,
    grouped_linear_sum_gemv,
    grouped_linear_sum_ref,
)
from graphllm.kernels.grouped_linear import (
    grouped_gated_linear,
    grouped_gated_linear_ref,
    grouped_linear,
    grouped_linear_ref,
)
from graphllm.kernels.moe_routing import RoutingRule, moe_routing, moe_routing_ref
from graphllm.kernels.moe_sum import SharedPart, moe_sum, moe_sum_ref
from graphllm.kernels.moe_tiles import expert_tiles, expert_tiles_ref
from tests.kernels.device import DEVICE
from tests.kernels.moe_inputs import MoEInputs, amid_nan, empty_tiles, moe_inputs, nan_like
from tests.kernels.test_moe_routing import RULES

pytestmark = pytest.mark.triton

# Two units in the last place of the 16-bit formats: the interpreter truncates.
RELATIVE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
CLAMPED = ClampedSwiGLU(alpha=1.702, limit=0.7)


# -- routing ---------------------------------------------------------------------------------------

LARGE_RULES = {
    "128 experts": RoutingRule(num_experts=128, top_k=8, scoring="softmax", normalizes=True),
    "groups that are no power of two": RoutingRule(
        num_experts=160,
        top_k=6,
        scoring="softmax",
        normalizes=False,
        scale=16.0,
        num_groups=8,
        num_chosen_groups=3,
        group_scoring="maximum",
    ),
}


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("name", [*RULES, *LARGE_RULES])
def test_routing_follows_its_rule(name: str, has_bias: bool) -> None:
    torch.manual_seed(0)
    rule = (RULES | LARGE_RULES)[name]
    num_tokens = 33
    logits = torch.randn(num_tokens, rule.num_experts + 1, device=DEVICE) * 2
    logits[:, -1] = math.nan  # of the shared experts' gate
    logits[3] = 1.0  # all alike: the first ones
    logits[5, 2] = math.nan
    bias = torch.randn(rule.num_experts, device=DEVICE) if has_bias else None
    slots = torch.arange(num_tokens, device=DEVICE)
    slots[-2:] = -1
    found, expected = (
        (
            torch.full((num_tokens, rule.top_k), -7, dtype=torch.int32, device=DEVICE),
            nan_like(num_tokens, rule.top_k, dtype=torch.float32),
        )
        for _ in range(2)
    )
    moe_routing(logits, bias, slots, rule=rule, experts=found[0], weights=found[1])
    moe_routing_ref(logits, bias, slots, rule=rule, experts=expected[0], weights=expected[1])
    is_number = torch.arange(num_tokens) != 5
    assert torch.equal(found[0][is_number], expected[0][is_number])
    torch.testing.assert_close(found[1][is_number], expected[1][is_number], rtol=1e-5, atol=1e-7)
    assert ((found[0][5] >= 0) & (found[0][5] < rule.num_experts)).all(), "a NaN leads to no other memory"


# -- tiles -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "rows_per_tile"),
    [(1, 1, 1, 16), (5, 2, 3, 16), (300, 2, 3, 16), (70, 4, 5, 32), (700, 2, 2, 128), (4, 8, 20, 16)],
)
def test_tiles_are_those_of_the_reference(
    num_tokens: int, top_k: int, num_experts: int, rows_per_tile: int
) -> None:
    torch.manual_seed(0)
    experts = torch.randint(num_experts, (num_tokens, top_k), dtype=torch.int32).to(DEVICE)
    experts[num_tokens // 2 :: 3] = -1
    found, expected = (
        empty_tiles(experts.numel(), num_experts=num_experts, rows_per_tile=rows_per_tile) for _ in range(2)
    )
    expert_tiles(experts, num_experts=num_experts, out=found)
    expert_tiles_ref(experts, num_experts=num_experts, out=expected)
    is_used = expected.experts >= 0
    assert torch.equal(found.experts, expected.experts)
    assert torch.equal(found.pairs[is_used], expected.pairs[is_used])


def test_padding_alone_leaves_every_tile_unused() -> None:
    experts = torch.full((6, 2), -1, dtype=torch.int32, device=DEVICE)
    tiles = expert_tiles(experts, num_experts=4, out=empty_tiles(12, num_experts=4, rows_per_tile=16))
    assert (tiles.experts == -1).all()


# -- products --------------------------------------------------------------------------------------

Case = tuple[torch.dtype, ExpertActivation, bool, int]
# Tiles of 16 hold experts with fewer and with more pairs than that.
CASES: list[Case] = [
    (torch.float32, "silu", False, 16),
    (torch.float32, CLAMPED, True, 16),
    (torch.bfloat16, "gelu_tanh", True, 16),
    (torch.bfloat16, "silu", False, 64),
    (torch.float16, CLAMPED, True, 128),
]


def inputs(dtype: torch.dtype, *, has_bias: bool, rows_per_tile: int, whole: bool = False) -> MoEInputs:
    torch.manual_seed(0)
    hidden, intermediate = (128, 64) if whole else (150, 70)
    return moe_inputs(
        num_tokens=20,
        top_k=2,
        num_experts=3,
        hidden=hidden,
        intermediate=intermediate,
        dtype=dtype,
        rows_per_tile=rows_per_tile,
        has_bias=has_bias,
    )


def assert_close(found: Tensor, expected: Tensor) -> None:
    relative = 4 * RELATIVE[found.dtype]
    torch.testing.assert_close(found, expected, rtol=relative, atol=relative, equal_nan=True)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("dtype", "activation", "has_bias", "rows_per_tile"), CASES)
def test_products_in_tiles_are_those_of_the_reference(
    dtype: torch.dtype, activation: ExpertActivation, has_bias: bool, rows_per_tile: int, whole: bool
) -> None:
    given = inputs(dtype, has_bias=has_bias, rows_per_tile=rows_per_tile, whole=whole)
    num_pairs, hidden, intermediate = 40, given.x.shape[1], given.down.shape[2]
    arguments = (given.x, given.gate_up, given.gate_up_bias, given.experts, activation)
    inner, inner_ref = (nan_like(num_pairs, intermediate, dtype=dtype) for _ in range(2))
    grouped_gated_linear(*arguments, tiles=given.tiles, out=inner)
    assert_close(inner, grouped_gated_linear_ref(*arguments, out=inner_ref))
    assert inner[-2:].isnan().all(), "nothing is stored for padding"

    down = (inner_ref, given.down, given.down_bias, given.experts, given.weights)
    results, results_ref = (nan_like(num_pairs, hidden, dtype=dtype) for _ in range(2))
    grouped_linear(*down, tiles=given.tiles, out=results)
    assert_close(results, grouped_linear_ref(*down, out=results_ref))
    assert results[-2:].isnan().all(), "nothing is stored for padding"


@pytest.mark.parametrize(("dtype", "activation", "has_bias"), [case[:3] for case in CASES[:4]])
def test_products_pair_by_pair_are_those_of_the_reference(
    dtype: torch.dtype, activation: ExpertActivation, has_bias: bool
) -> None:
    torch.manual_seed(0)
    given = moe_inputs(
        num_tokens=3,
        top_k=2,
        num_experts=4,
        hidden=22,
        intermediate=9,
        dtype=dtype,
        has_bias=has_bias,
    )
    arguments = (given.x, given.gate_up, given.gate_up_bias, given.experts, activation)
    inner, inner_ref = (nan_like(6, 9, dtype=dtype) for _ in range(2))
    grouped_gated_gemv(*arguments, out=inner)
    assert_close(inner, grouped_gated_linear_ref(*arguments, out=inner_ref))
    assert inner[-2:].isnan().all(), "nothing is stored for padding"

    shared = SharedPart(amid_nan(3, 22, dtype=dtype), torch.randn(3, 5, device=DEVICE)) if has_bias else None
    down = (inner_ref, given.down, given.down_bias, given.experts, given.weights, shared)
    found, expected = (nan_like(3, 22, dtype=dtype) for _ in range(2))
    grouped_linear_sum_gemv(*down, out=found)
    assert_close(found, grouped_linear_sum_ref(*down, out=expected))
    assert found.isfinite().all(), "what padding has left is not added"


def test_tiles_of_others_do_not_change_a_pair_s_result() -> None:
    """Bit for bit: the order of a sum does not depend on where in a tile a pair stands."""
    given = inputs(torch.float32, has_bias=False, rows_per_tile=16, whole=True)
    alone = given.experts.clone()
    alone[1:] = -1
    tiles = expert_tiles(alone, num_experts=3, out=empty_tiles(40, num_experts=3, rows_per_tile=16))
    found = []
    for experts, layout in ((given.experts, given.tiles), (alone, tiles)):
        out = nan_like(40, 64, dtype=torch.float32)
        found.append(
            grouped_gated_linear(given.x, given.gate_up, None, experts, "silu", tiles=layout, out=out)
        )
    assert torch.equal(found[0][:2], found[1][:2])
    assert found[1][2:].isnan().all()


# -- the sum ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [None, "plain", "gated"])
@pytest.mark.parametrize("dtype", RELATIVE)
def test_sum_of_a_token_s_results(dtype: torch.dtype, shared: str | None) -> None:
    torch.manual_seed(0)
    experts = torch.randint(4, (5, 3), dtype=torch.int32).to(DEVICE)
    experts[3] = -1
    results = amid_nan(15, 1030, dtype=dtype)
    results[9:12] = math.nan
    output, logits = amid_nan(5, 1030, dtype=dtype), torch.randn(5, 7, device=DEVICE)
    part = SharedPart(output, logits if shared == "gated" else None) if shared else None
    expected = moe_sum_ref(results, experts, part, out=nan_like(5, 1030, dtype=dtype))
    out = nan_like(5, 1030, dtype=dtype) if part is None else output
    assert_close(moe_sum(results, experts, part, out=out), expected)
    assert out.isfinite().all()
