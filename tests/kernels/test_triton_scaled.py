"""Products in 8 bits against their references: interpreted, or compiled on a card."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from graphllm.kernels.expert_activation import ClampedSwiGLU, ExpertActivation
from graphllm.kernels.linear import LinearWorkspace
from graphllm.kernels.moe_sum import SharedPart
from graphllm.kernels.quantize_rows import num_groups_of, quantize_rows, quantize_rows_ref
from graphllm.kernels.scaled_grouped import (
    scaled_grouped_gated,
    scaled_grouped_gated_ref,
    scaled_grouped_linear,
    scaled_grouped_linear_ref,
)
from graphllm.kernels.scaled_grouped_gemv import (
    scaled_grouped_gated_gemv,
    scaled_grouped_sum,
    scaled_grouped_sum_ref,
)
from graphllm.kernels.scaled_linear import (
    ScaledConfig,
    ScaledRows,
    ScaledWeight,
    scaled_linear,
    scaled_linear_ref,
    scaled_workspace_size,
)
from tests.kernels.device import DEVICE
from tests.kernels.moe_inputs import MoEInputs, amid_nan, moe_inputs, nan_like

E4M3, INT8 = torch.float8_e4m3fn, torch.int8


def has_e4m3() -> bool:
    return DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= (8, 9)


pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not has_e4m3(), reason="the card has no 8-bit floating-point numbers"),
]

FORMATS: list[tuple[torch.dtype, int | None]] = [(E4M3, None), (E4M3, 32), (INT8, None)]
CLAMPED = ClampedSwiGLU(alpha=1.702, limit=0.7)


def bits(values: Tensor) -> Tensor:
    return values.view(torch.uint8)


def quantized(x: Tensor, dtype: torch.dtype, group_size: int | None) -> ScaledRows:
    values = torch.empty(x.shape, dtype=dtype, device=DEVICE)
    scales = torch.empty(len(x), num_groups_of(x.shape[1], group_size), device=DEVICE)
    quantize_rows_ref(x, group_size, given=None, out=values, scales=scales)
    return ScaledRows(values, scales)


def quantized_weight(weight: Tensor, dtype: torch.dtype, group_size: int | None) -> ScaledWeight:
    rows = quantized(weight.reshape(-1, weight.shape[-1]), dtype, group_size)
    return ScaledWeight(rows.values, rows.scales.t().contiguous(), group_size)


# -- rounding --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "group_size"), [*FORMATS, (E4M3, 128)])
@pytest.mark.parametrize("in_features", [300, 9000])
def test_rows_are_rounded_bit_for_bit_as_the_reference_has_it(
    dtype: torch.dtype, group_size: int | None, in_features: int
) -> None:
    torch.manual_seed(0)
    x = amid_nan(4, in_features, dtype=torch.bfloat16)
    x[1] = 0.0
    x[2, 5] = 30000.0
    found = ScaledRows(
        nan_like(4, in_features, dtype=torch.float32).to(dtype), quantized(x, dtype, group_size).scales
    )
    found.scales.fill_(math.nan)
    expected = quantized(x, dtype, group_size)
    quantize_rows(x, group_size, given=None, out=found.values, scales=found.scales)
    assert torch.equal(bits(found.values), bits(expected.values))
    assert torch.equal(found.scales, expected.scales)


def test_e4m3_rounds_ties_as_torch_does_and_saturates() -> None:
    finite = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    ordered = finite[~finite.isnan()].sort().values.unique()
    middles = (ordered[1:] + ordered[:-1]) / 2
    near = [torch.nextafter(middles, torch.tensor(way)) for way in (math.inf, -math.inf)]
    x = torch.cat([ordered, middles, *near]).to(DEVICE)[None]
    found, by_reference = (torch.empty(x.shape, dtype=E4M3, device=DEVICE) for _ in range(2))
    scales, one = torch.empty(1, 1, device=DEVICE), torch.ones(1, device=DEVICE)
    quantize_rows(x, None, given=one, out=found, scales=scales)
    assert torch.equal(bits(found), bits(x.to(E4M3))) and scales.item() == 1.0
    quantize_rows_ref(x, None, given=one, out=by_reference, scales=scales)
    assert torch.equal(bits(by_reference), bits(found))
    beyond = torch.tensor([[449.0, 464.0, 465.0, 1e9, -1e9]], device=DEVICE)
    for function in (quantize_rows, quantize_rows_ref):
        out = torch.empty(beyond.shape, dtype=E4M3, device=DEVICE)
        function(beyond, None, given=one, out=out, scales=scales)
        assert out.float().tolist() == [[448.0] * 4 + [-448.0]]


def test_a_given_scale_is_every_row_s() -> None:
    torch.manual_seed(0)
    x, given = amid_nan(3, 200, dtype=torch.float32) * 9, torch.tensor([0.07], device=DEVICE)
    for dtype in (E4M3, INT8):
        pair = [
            (torch.empty(x.shape, dtype=dtype, device=DEVICE), torch.empty(3, 1, device=DEVICE))
            for _ in range(2)
        ]
        for function, (out, scales) in zip((quantize_rows, quantize_rows_ref), pair, strict=True):
            function(x, None, given=given, out=out, scales=scales)
            assert (scales == given).all()
        assert torch.equal(bits(pair[0][0]), bits(pair[1][0]))


def test_a_given_scale_of_integers_reaches_all_of_their_range() -> None:
    """Whose scales take the range for 255 steps have -128 at its end, as compressed-tensors does."""
    x, one = torch.tensor([[-300.0, -128.4, -127.6, 126.5, 127.6, 300.0]], device=DEVICE), torch.ones(1)
    for function in (quantize_rows, quantize_rows_ref):
        out, scales = torch.empty(x.shape, dtype=INT8, device=DEVICE), torch.empty(1, 1, device=DEVICE)
        function(x, None, given=one.to(DEVICE), out=out, scales=scales)
        assert out.tolist() == [[-128, -128, -128, 126, 127, 127]]


# -- linear layers ---------------------------------------------------------------------------------


def workspace_of(num_partials: int, num_counters: int) -> LinearWorkspace:
    return LinearWorkspace(
        torch.full((num_partials,), math.nan, device=DEVICE),
        torch.zeros(num_counters, dtype=torch.int32, device=DEVICE),
    )


@pytest.mark.parametrize(("dtype", "group_size"), FORMATS)
@pytest.mark.parametrize(
    ("num_rows", "out_features", "in_features"), [(1, 33, 300), (17, 70, 1060), (64, 32, 96), (70, 130, 200)]
)
def test_products_of_few_and_many_rows_are_the_reference_s(
    dtype: torch.dtype, group_size: int | None, num_rows: int, out_features: int, in_features: int
) -> None:
    torch.manual_seed(num_rows)
    x = quantized(torch.randn(num_rows, in_features, device=DEVICE), dtype, group_size)
    weight = quantized_weight(torch.randn(out_features, in_features, device=DEVICE), dtype, group_size)
    bias = torch.randn(out_features, device=DEVICE) if num_rows % 2 else None
    workspace = workspace_of(*scaled_workspace_size(out_features, in_features, group_size=group_size))
    memory = torch.full((num_rows + 2, out_features), math.nan, device=DEVICE)
    out = memory[1:-1]
    assert scaled_linear(x, weight, bias, out, workspace=workspace) is out
    expected = scaled_linear_ref(x, weight, bias, torch.empty_like(out))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)
    assert memory[0].isnan().all() and memory[-1].isnan().all() and not workspace.counters.any()


@pytest.mark.parametrize("group_size", [None, 32])
def test_split_sums_are_whole_and_the_same_in_any_split_of_exact_numbers(group_size: int | None) -> None:
    torch.manual_seed(0)
    dtype = INT8 if group_size is None else E4M3
    x = quantized(torch.randn(5, 700, device=DEVICE), dtype, group_size)
    weight = quantized_weight(torch.randn(40, 700, device=DEVICE), dtype, group_size)
    found = []
    for splits in (1, 3, 8):  # of 22 tiles, the last program's lie behind the end
        config = ScaledConfig(16, 32, 32, splits, num_warps=4, num_stages=2)
        workspace = workspace_of(splits * 16 * 40, 2)
        out = torch.empty(5, 40, device=DEVICE)
        found.append(scaled_linear(x, weight, None, out, workspace=workspace, config=config))
        assert not workspace.counters.any()
    expected = scaled_linear_ref(x, weight, None, torch.empty(5, 40, device=DEVICE))
    for out in found:
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)
    if dtype == INT8:
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_int8_sums_are_exact_where_float32_would_not_be() -> None:
    """On their way they are odd numbers beyond 2 ** 24."""
    values = torch.full((1, 4096), 127, dtype=INT8, device=DEVICE)
    weights = values.repeat(16, 1)
    weights[:, 2048:] = -127
    weights[:, 300] = 126
    ones = torch.ones(1, 16, device=DEVICE)
    out = torch.empty(1, 16, device=DEVICE)
    config = ScaledConfig(16, 16, 256, 1, num_warps=4, num_stages=2)
    x, weight = ScaledRows(values, ones[:, :1]), ScaledWeight(weights, ones, None)
    scaled_linear(x, weight, None, out, workspace=workspace_of(0, 0), config=config)
    assert (out == -127.0).all()


# -- experts ---------------------------------------------------------------------------------------

EXPERT_CASES: list[tuple[torch.dtype, int | None, ExpertActivation, bool, int]] = [
    (E4M3, None, "silu", False, 16),
    (E4M3, 32, CLAMPED, True, 16),
    (E4M3, 32, "silu", False, 64),
    (INT8, None, "gelu_tanh", True, 32),
]


def inputs(
    *, num_tokens: int, has_bias: bool, rows_per_tile: int = 16, hidden: int = 150, intermediate: int = 70
) -> MoEInputs:
    torch.manual_seed(0)
    return moe_inputs(
        num_tokens=num_tokens,
        top_k=2,
        num_experts=3,
        hidden=hidden,
        intermediate=intermediate,
        dtype=torch.float32,
        rows_per_tile=rows_per_tile,
        has_bias=has_bias,
    )


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(("dtype", "group_size", "activation", "has_bias", "rows_per_tile"), EXPERT_CASES)
def test_experts_in_tiles_are_those_of_the_reference(
    dtype: torch.dtype,
    group_size: int | None,
    activation: ExpertActivation,
    has_bias: bool,
    rows_per_tile: int,
) -> None:
    given = inputs(num_tokens=20, has_bias=has_bias, rows_per_tile=rows_per_tile)
    x, weight = quantized(given.x, dtype, group_size), quantized_weight(given.gate_up, dtype, group_size)
    arguments = (x, weight, given.gate_up_bias, given.experts, activation)
    inner, inner_ref = (nan_like(40, 70, dtype=torch.float32) for _ in range(2))
    scaled_grouped_gated(*arguments, num_experts=3, tiles=given.tiles, out=inner)
    assert_close(inner, scaled_grouped_gated_ref(*arguments, num_experts=3, out=inner_ref))
    assert inner[-2:].isnan().all(), "nothing is stored for padding"

    rows, down = quantized(inner_ref, dtype, group_size), quantized_weight(given.down, dtype, group_size)
    arguments = (rows, down, given.down_bias, given.experts, given.weights)
    results, results_ref = (nan_like(40, 150, dtype=torch.float32) for _ in range(2))
    scaled_grouped_linear(*arguments, num_experts=3, tiles=given.tiles, out=results)
    assert_close(results, scaled_grouped_linear_ref(*arguments, num_experts=3, out=results_ref))
    assert results[-2:].isnan().all(), "nothing is stored for padding"


@pytest.mark.parametrize(("dtype", "group_size", "activation", "has_bias"), [c[:4] for c in EXPERT_CASES])
def test_experts_pair_by_pair_are_those_of_the_reference(
    dtype: torch.dtype, group_size: int | None, activation: ExpertActivation, has_bias: bool
) -> None:
    given = inputs(num_tokens=3, has_bias=has_bias, hidden=42, intermediate=37)
    x, weight = quantized(given.x, dtype, group_size), quantized_weight(given.gate_up, dtype, group_size)
    arguments = (x, weight, given.gate_up_bias, given.experts, activation)
    inner, inner_ref = (nan_like(6, 37, dtype=torch.float32) for _ in range(2))
    scaled_grouped_gated_gemv(*arguments, num_experts=3, out=inner)
    assert_close(inner, scaled_grouped_gated_ref(*arguments, num_experts=3, out=inner_ref))
    assert inner[-2:].isnan().all(), "nothing is stored for padding"

    rows, down = quantized(inner_ref, dtype, group_size), quantized_weight(given.down, dtype, group_size)
    shared = None
    if has_bias:
        shared = SharedPart(amid_nan(3, 42, dtype=torch.float32), torch.randn(3, 5, device=DEVICE))
    arguments = (rows, down, given.down_bias, given.experts, given.weights, shared)
    found, expected = (nan_like(3, 42, dtype=torch.float32) for _ in range(2))
    scaled_grouped_sum(*arguments, num_experts=3, out=found)
    assert_close(found, scaled_grouped_sum_ref(*arguments, num_experts=3, out=expected))
    assert found.isfinite().all(), "what padding has left is not added"
