from __future__ import annotations

import math

import pytest
import torch

from graphllm.kernels.rms_norm import add_rms_norm, rms_norm

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 48), (3, 2, 33), (0, 16)])
def test_equals_the_formula_in_python_floats(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape).mul_(3).to(dtype), torch.randn(shape[-1]).to(dtype)
    normed = rms_norm(x, weight, eps=0.25)
    assert normed.shape == x.shape and normed.dtype == dtype
    for row, normed_row in zip(x.view(-1, shape[-1]).tolist(), normed.view(-1, shape[-1]), strict=True):
        scale = 1 / math.sqrt(sum(value * value for value in row) / len(row) + 0.25)
        expected = [value * scale * factor for value, factor in zip(row, weight.tolist(), strict=True)]
        difference = (normed_row.double() - torch.tensor(expected, dtype=torch.float64)).abs().max()
        assert difference <= TOLERANCE[dtype] * max(map(abs, expected))


def test_does_not_write_to_its_input() -> None:
    x = torch.randn(4, 8)
    before = x.clone()
    rms_norm(x, torch.full((8,), 2.0), eps=1e-6)
    assert torch.equal(x, before)


def test_squares_are_summed_in_float32() -> None:
    x = torch.full((1, 4096), 16.0, dtype=torch.float16)  # the sum of squares is beyond float16
    assert torch.equal(rms_norm(x, torch.ones(4096, dtype=torch.float16), eps=0.0), torch.ones_like(x))


def test_result_is_rounded_before_the_weight_as_transformers_does() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    x = torch.randn(64, 40).bfloat16()
    norm = LlamaRMSNorm(40, eps=1e-3).bfloat16()
    norm.weight.data.normal_()
    ours = rms_norm(x, norm.weight.detach(), eps=1e-3)
    # Last bits of the float32 reduction may fall on either side of a rounding to bfloat16.
    assert (ours != norm(x)).float().mean() < 0.01


def test_unit_offset_multiplies_in_float32_before_rounding_as_gemma_does() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    torch.manual_seed(0)
    x = torch.randn(64, 40).bfloat16()
    norm = Gemma3RMSNorm(40, eps=1e-3).bfloat16()
    norm.weight.data.normal_()
    ours = rms_norm(x, norm.weight.detach(), eps=1e-3, unit_offset=True)
    assert ours.dtype == torch.bfloat16 and (ours != norm(x)).float().mean() < 0.01


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_add_is_the_addition_and_the_norm_one_after_the_other(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual, weight = (torch.randn(*shape).to(dtype) for shape in ((5, 48), (5, 48), (48,)))
    for unit_offset in (False, True):
        summed, out = residual.clone(), torch.full_like(x, torch.nan)
        assert add_rms_norm(x, summed, weight, eps=1e-3, unit_offset=unit_offset, out=out) is out
        assert torch.equal(summed, residual + x)
        assert torch.equal(out, rms_norm(residual + x, weight, eps=1e-3, unit_offset=unit_offset))


def test_chosen_rows_are_normed_and_the_residual_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(5, 48), torch.randn(5, 48), torch.randn(48)
    rows, before, out = torch.tensor([4, 0, 4, 1, 2, 2]), residual.clone(), torch.empty(6, 48)
    add_rms_norm(x, residual, weight, eps=1e-3, rows=rows, out=out)
    assert torch.equal(residual, before)
    assert torch.equal(out, rms_norm((x + residual)[rows], weight, eps=1e-3))


def test_norm_may_replace_its_input() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8)
    expected = rms_norm(x, weight, eps=1e-6)
    assert torch.equal(rms_norm(x, weight, eps=1e-6, out=x), expected)
    assert torch.equal(x, expected)


def test_heads_may_have_factors_of_their_own() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 3, 16), torch.randn(3, 16)
    found = rms_norm(x, weight, eps=1e-3)
    for head in range(3):
        assert torch.equal(found[:, head], rms_norm(x[:, head].contiguous(), weight[head], eps=1e-3))


def test_the_addition_may_be_scaled() -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(5, 48), torch.randn(5, 48), torch.randn(48)
    summed, out = residual.clone(), torch.empty_like(x)
    add_rms_norm(x, summed, weight, eps=1e-3, scale=0.22, out=out)
    assert torch.equal(summed, residual + 0.22 * x)
    assert torch.equal(out, rms_norm(summed, weight, eps=1e-3))
