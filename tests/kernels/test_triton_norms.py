"""The norm kernels against their references."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from graphllm.kernels.layer_norm import add_layer_norm, add_layer_norm_ref, layer_norm, layer_norm_ref
from graphllm.kernels.rms_norm import (
    MAX_HIDDEN,
    add_rms_norm,
    add_rms_norm_ref,
    rms_norm,
    rms_norm_ref,
    row_layout,
)
from graphllm.kernels.triton_support import INTERPRETED
from tests.kernels.device import DEVICE

pytestmark = pytest.mark.triton

HIDDEN_SIZES = [1, 64, 80, 576, 2048, 4096, 5120, 8192]
# Each rounding to bfloat16 may fall to either side; the interpreter truncates instead.
ROUNDING = {torch.float32: 3e-6, torch.float16: 2**-10, torch.bfloat16: 2**-6 if INTERPRETED else 2**-7}


def _random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).mul_(3).to(dtype).to(DEVICE)


def _inputs(num_tokens: int, hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, residual, weight, bias."""
    shapes = ((num_tokens, hidden), (num_tokens, hidden), (hidden,), (hidden,))
    return tuple(_random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes))


def _assert_close(found: torch.Tensor, expected: torch.Tensor, *, roundings: int) -> None:
    """Equal but for so many roundings, each in proportion to the value or, for a sum, to its largest term."""
    tolerance = roundings * ROUNDING[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("hidden", HIDDEN_SIZES)
def test_rms_norm_equals_its_reference(hidden: int, dtype: torch.dtype) -> None:
    x, _, weight, _ = _inputs(3, hidden, dtype)
    for unit_offset in (False, True):
        found = rms_norm(x, weight, eps=0.1, unit_offset=unit_offset, out=torch.full_like(x, torch.nan))
        _assert_close(found, rms_norm_ref(x, weight, eps=0.1, unit_offset=unit_offset), roundings=2)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("hidden", [1, 80, 576, 2048, 8192])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_add_rms_norm_equals_its_reference(unit_offset: bool, hidden: int, dtype: torch.dtype) -> None:
    x, residual, weight, _ = _inputs(3, hidden, dtype)
    x_before, residual_ref, out_ref = x.clone(), residual.clone(), torch.empty_like(x)
    add_rms_norm_ref(x, residual_ref, weight, eps=0.1, unit_offset=unit_offset, out=out_ref)
    out = torch.full_like(x, torch.nan)
    assert add_rms_norm(x, residual, weight, eps=0.1, unit_offset=unit_offset, out=out) is out
    _assert_close(residual, residual_ref, roundings=1)
    _assert_close(out, out_ref, roundings=4)
    assert torch.equal(x, x_before)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("hidden", [1, 80, 576, 2048, 8192])
@pytest.mark.parametrize("affine", ["weight and bias", "weight", "bias", "nothing"])
def test_layer_norms_equal_their_references(affine: str, hidden: int, dtype: torch.dtype) -> None:
    x, residual, all_weights, all_biases = _inputs(2, hidden, dtype)
    weight = all_weights if "weight" in affine else None
    bias = all_biases if "bias" in affine else None
    found = layer_norm(x, weight, bias, eps=0.1, out=torch.full_like(x, torch.nan))
    # A sum that cancels keeps the roundings of its terms, which are as large as 40 here.
    _assert_close(found, layer_norm_ref(x, weight, bias, eps=0.1, out=torch.empty_like(x)), roundings=8)

    residual_ref, out_ref, out = residual.clone(), torch.empty_like(x), torch.full_like(x, torch.nan)
    add_layer_norm_ref(x, residual_ref, weight, bias, eps=0.1, out=out_ref)
    assert add_layer_norm(x, residual, weight, bias, eps=0.1, out=out) is out
    _assert_close(residual, residual_ref, roundings=1)
    _assert_close(out, out_ref, roundings=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chosen_rows_are_normed_and_the_residual_is_left_as_it_is(dtype: torch.dtype) -> None:
    x, residual, weight, bias = _inputs(5, 80, dtype)
    rows = torch.tensor([4, 0, 4], device=DEVICE)
    x[1:4] = torch.nan
    residual[1:4] = torch.nan
    before = residual.clone()
    out, out_ref = (torch.full((3, 80), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2))
    add_rms_norm(x, residual, weight, eps=1e-5, rows=rows, out=out)
    _assert_close(out, add_rms_norm_ref(x, residual, weight, eps=1e-5, rows=rows, out=out_ref), roundings=4)
    assert torch.equal(out[0], out[2])
    add_layer_norm(x, residual, weight, bias, eps=1e-5, rows=rows, out=out)
    expected = add_layer_norm_ref(x, residual, weight, bias, eps=1e-5, rows=rows, out=out_ref)
    _assert_close(out, expected, roundings=16)
    torch.testing.assert_close(residual, before, rtol=0, atol=0, equal_nan=True)


def test_rows_of_more_dimensions_are_normed_each_by_itself() -> None:
    heads, weight = _random(3, 4, 64, dtype=torch.float32), _random(64, dtype=torch.float32)
    heads[1, 2] = torch.nan
    expected = rms_norm_ref(heads, weight, eps=1e-6)
    found = rms_norm(heads, weight, eps=1e-6, out=heads)  # in place
    torch.testing.assert_close(found, expected, rtol=3e-6, atol=3e-6, equal_nan=True)
    assert found.isnan().sum() == 64


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("scale", [0.22, 2.0])
def test_the_addition_may_be_scaled(scale: float, dtype: torch.dtype) -> None:
    x, residual, weight, bias = _inputs(3, 80, dtype)
    rows = torch.tensor([2, 0], device=DEVICE)
    for at, lines in ((None, 3), (rows, 2)):
        left, expected = residual.clone(), residual.clone()
        out, out_ref = (torch.full((lines, 80), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2))
        add_rms_norm(x, left, weight, eps=0.1, scale=scale, rows=at, out=out)
        add_rms_norm_ref(x, expected, weight, eps=0.1, scale=scale, rows=at, out=out_ref)
        _assert_close(left, expected, roundings=2)
        _assert_close(out, out_ref, roundings=8)
        left, expected = residual.clone(), residual.clone()
        add_layer_norm(x, left, weight, bias, eps=0.1, scale=scale, rows=at, out=out)
        add_layer_norm_ref(x, expected, weight, bias, eps=0.1, scale=scale, rows=at, out=out_ref)
        _assert_close(left, expected, roundings=2)
        _assert_close(out, out_ref, roundings=32)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("num_heads", [None, 3])
@pytest.mark.parametrize("has_own_factors", [False, True])
def test_heads_in_the_middle_of_a_merged_projection_are_normed_in_place(
    has_own_factors: bool, num_heads: int | None, dtype: torch.dtype
) -> None:
    """num_heads None: all heads of a token as one row."""
    if has_own_factors and num_heads is None:
        return
    size = 48 if num_heads is None else 16
    factors = (num_heads, size) if has_own_factors and num_heads else (size,)
    weight, bias = (_random(*factors, dtype=dtype, seed=seed) for seed in (3, 4))
    for norm, reference, roundings in (
        (partial(rms_norm, weight=weight), partial(rms_norm_ref, weight=weight), 2),
        (
            partial(layer_norm, weight=weight, bias=bias),
            partial(layer_norm_ref, weight=weight, bias=bias),
            8,
        ),
    ):
        merged = _random(5, 80, dtype=dtype)
        before = merged.clone()
        part = merged[:, 16:64] if num_heads is None else merged[:, 16:64].view(5, num_heads, size)
        expected = reference(part.contiguous(), eps=0.1, out=torch.empty_like(part.contiguous()))
        norm(part, eps=0.1, out=part)
        _assert_close(part, expected, roundings=roundings)
        assert torch.equal(merged[:, :16], before[:, :16]) and torch.equal(merged[:, 64:], before[:, 64:])


def test_nothing_outside_the_rows_is_written() -> None:
    x, residual, weight, bias = _inputs(2, 80, torch.float32)
    memory = torch.full((4, 80), -77.0, device=DEVICE)
    rms_norm(x, weight, eps=1e-6, out=memory[1:3])
    layer_norm(x, weight, bias, eps=1e-6, out=memory[1:3])
    add_rms_norm(x, residual, weight, eps=1e-6, out=memory[1:3])
    add_layer_norm(x, residual, weight, bias, eps=1e-6, out=memory[1:3])
    assert (memory[[0, 3]] == -77.0).all() and (memory[1:3] != -77.0).all()


def test_no_rows_are_no_error() -> None:
    x, residual, weight, bias = _inputs(0, 64, torch.float32)
    out = torch.empty_like(x)
    rms_norm(x, weight, eps=1e-6, out=out)
    add_rms_norm(x, residual, weight, eps=1e-6, out=out)
    layer_norm(x, weight, bias, eps=1e-6, out=out)
    add_layer_norm(x, residual, weight, bias, eps=1e-6, out=out)


def test_llama_rounds_before_the_weight_and_gemma_after() -> None:
    # float16, because the interpreter rounds it correctly. Sums in another order move few last bits.
    x, _, weight, _ = _inputs(4, 2048, torch.float16)
    out = torch.empty_like(x)
    llama = rms_norm(x, weight, eps=1e-6, out=out).clone()
    assert (llama != rms_norm_ref(x, weight, eps=1e-6)).float().mean() < 0.01
    gemma = rms_norm(x, weight - 1, eps=1e-6, unit_offset=True, out=out)
    assert (gemma != rms_norm_ref(x, weight - 1, eps=1e-6, unit_offset=True)).float().mean() < 0.01
    assert (llama != gemma).float().mean() > 0.1


def test_it_is_the_rounded_sum_that_is_normed() -> None:
    # float16 for the same reason.
    x, residual, weight, _ = _inputs(4, 2048, torch.float16)
    residual *= 10
    rounded, exact = residual + x, residual.float() + x.float()
    out = add_rms_norm(x, residual.clone(), weight, eps=1e-6, out=torch.empty_like(x))
    assert (out != rms_norm_ref(rounded, weight, eps=1e-6)).float().mean() < 0.01
    assert (out != rms_norm_ref(exact, weight, eps=1e-6).half()).float().mean() > 0.1
    add_layer_norm(x, residual.clone(), weight, None, eps=1e-6, out=out)
    unused = torch.empty_like(x)
    assert (out != layer_norm_ref(rounded, weight, None, eps=1e-6, out=unused)).float().mean() < 0.01
    unrounded = layer_norm_ref(exact, weight.float(), None, eps=1e-6, out=torch.empty_like(exact))
    assert (out != unrounded.half()).float().mean() > 0.1


def test_squares_are_summed_in_float32() -> None:
    x = torch.full((1, 4096), 16.0, dtype=torch.float16, device=DEVICE)  # squares beyond float16
    found = rms_norm(x, torch.ones_like(x[0]), eps=0.0, out=torch.empty_like(x))
    assert torch.equal(found, torch.ones_like(x))


def test_a_small_variance_beside_a_large_mean_is_kept() -> None:
    x = 1000 + _random(1, 1024, dtype=torch.float32) / 100
    found = layer_norm(x, None, None, eps=0.0, out=torch.empty_like(x))
    exact = torch.nn.functional.layer_norm(x.double(), (1024,), eps=0.0)
    assert (found - exact).abs().max() < 1e-2  # differences of squares would be off by more than 1


def test_row_layout_holds_every_row_that_it_accepts() -> None:
    for hidden in range(1, MAX_HIDDEN + 1):
        tile, num_warps = row_layout(hidden)
        assert tile >= hidden and tile & (tile - 1) == 0 and tile < max(2 * hidden, 64)
        assert num_warps & (num_warps - 1) == 0 and tile // (32 * num_warps) <= 32
    with pytest.raises(AssertionError):
        row_layout(MAX_HIDDEN + 1)
