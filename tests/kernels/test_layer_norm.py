from __future__ import annotations

import pytest
import torch

from graphllm.kernels.layer_norm import add_layer_norm, layer_norm

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 48), (3, 2, 33), (0, 16)])
@pytest.mark.parametrize("affine", ["weight and bias", "weight", "bias", "nothing"])
def test_equals_the_formula_in_float64(affine: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).mul_(3).add_(1).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype) if "weight" in affine else None
    bias = torch.randn(shape[-1]).to(dtype) if "bias" in affine else None
    before, out = x.clone(), torch.full_like(x, torch.nan)
    assert layer_norm(x, weight, bias, eps=0.25, out=out) is out
    centered = x.double() - x.double().mean(-1, keepdim=True)
    expected = centered / (centered.square().mean(-1, keepdim=True) + 0.25).sqrt()
    if weight is not None:
        expected *= weight.double()
    if bias is not None:
        expected += bias.double()
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_add_is_the_addition_and_the_norm_one_after_the_other(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((5, 48), (5, 48), (48,), (48,)))
    summed, out = residual.clone(), torch.full_like(x, torch.nan)
    assert add_layer_norm(x, summed, weight, bias, eps=1e-3, out=out) is out
    assert torch.equal(summed, residual + x)
    assert torch.equal(out, layer_norm(residual + x, weight, bias, eps=1e-3, out=torch.empty_like(x)))


def test_chosen_rows_are_normed_and_the_residual_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    x, residual, weight, bias = torch.randn(5, 48), torch.randn(5, 48), torch.randn(48), torch.randn(48)
    rows, before, out = torch.tensor([4, 0, 4, 1, 2, 2]), residual.clone(), torch.empty(6, 48)
    add_layer_norm(x, residual, weight, bias, eps=1e-3, rows=rows, out=out)
    assert torch.equal(residual, before)
    expected = layer_norm((x + residual)[rows], weight, bias, eps=1e-3, out=torch.empty_like(out))
    assert torch.equal(out, expected)


def test_heads_may_have_factors_and_terms_of_their_own() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 3, 16), torch.randn(3, 16), torch.randn(3, 16)
    found = layer_norm(x, weight, bias, eps=1e-3, out=torch.empty_like(x))
    for head in range(3):
        alone = x[:, head].contiguous()
        expected = layer_norm(alone, weight[head], bias[head], eps=1e-3, out=torch.empty_like(alone))
        torch.testing.assert_close(found[:, head], expected)


def test_the_addition_may_be_scaled() -> None:
    torch.manual_seed(0)
    x, residual, weight, bias = torch.randn(5, 48), torch.randn(5, 48), torch.randn(48), torch.randn(48)
    summed, out = residual.clone(), torch.empty_like(x)
    add_layer_norm(x, summed, weight, bias, eps=1e-3, scale=0.22, out=out)
    assert torch.equal(summed, residual + 0.22 * x)
    assert torch.equal(out, layer_norm(summed, weight, bias, eps=1e-3, out=torch.empty_like(x)))
