from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from graphllm.kernels.linear import (
    LinearProduct,
    choose_cpu_product,
    gpu_product,
    linear_openblas,
    linear_ref,
    set_openblas_threads,
)

SHAPES = [(1, 1, 1), (1, 7, 5), (2, 64, 33), (16, 48, 96), (70, 33, 129), (0, 8, 4)]


def naive(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Sums of products in float64, no library behind it: [num_tokens, out_features]."""
    products = x.double()[:, None, :] * weight.double()[None]
    return products.sum(-1) + (0 if bias is None else bias.double())


def filled(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An `out` whose every element is wrong."""
    return torch.full((len(x), len(weight)), math.nan, dtype=dtype or x.dtype, device=x.device)


@pytest.mark.parametrize("product", [linear_ref, linear_openblas])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_sum_of_products(
    shape: tuple[int, int, int], has_bias: bool, product: LinearProduct
) -> None:
    num_tokens, in_features, out_features = shape
    torch.manual_seed(0)
    x, weight = torch.randn(num_tokens, in_features), torch.randn(out_features, in_features)
    bias = torch.randn(out_features) if has_bias else None
    out = filled(x, weight)
    result = product(x, weight, bias, out)
    assert result is out and out.shape == (num_tokens, out_features)
    assert torch.allclose(result.double(), naive(x, weight, bias), atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_low_precision_is_close_to_float64(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 40).to(dtype), torch.randn(30, 40).to(dtype), torch.randn(30).to(dtype)
    expected = naive(x, weight, bias)
    for out_dtype in (dtype, torch.float32):
        result = linear_ref(x, weight, bias, filled(x, weight, out_dtype))
        assert (result.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("product", [linear_ref, linear_openblas])
def test_reads_slices_with_strides(product: LinearProduct) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(6, 50)[:, 10:30], torch.randn(9, 20)
    result = product(x, weight, None, filled(x, weight))
    assert torch.allclose(result.double(), naive(x, weight, None), atol=1e-4)


def test_openblas_works_on_tensors_of_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.randn(3, 8)
        weight = torch.nn.Parameter(torch.randn(4, 8), requires_grad=False)
        ours = linear_openblas(x, weight, torch.ones(4), filled(x, weight))
        assert torch.allclose(ours, linear_ref(x, weight, torch.ones(4), filled(x, weight)))


@pytest.mark.gpu
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 16, 70])
def test_cublas_writes_float32_that_was_not_rounded_to_bfloat16(num_rows: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(num_rows, 512).bfloat16().cuda(), torch.randn(96, 512).bfloat16().cuda()
    bias = torch.randn(96).bfloat16().cuda() if has_bias else None
    product = gpu_product([(96, 512)], dtype=torch.bfloat16, device=x.device)
    result = product(x, weight, bias, filled(x, weight, torch.float32))
    assert torch.allclose(result.double(), naive(x, weight, bias), atol=1e-3)
    rounded = product(x, weight, bias, filled(x, weight))
    assert not torch.equal(rounded.float(), result)
    assert torch.allclose(rounded.float(), result, atol=1e-1, rtol=8e-3)


@pytest.mark.skipif(not set_openblas_threads(1), reason="numpy here is built on another library")
def test_openblas_takes_the_number_of_threads() -> None:
    import ctypes
    from pathlib import Path

    path = next((Path(np.__file__).parent.parent / "numpy.libs").glob("*openblas*"))
    num_threads = ctypes.CDLL(str(path)).scipy_openblas_get_num_threads64_
    assert set_openblas_threads(2) and num_threads() == 2
    assert set_openblas_threads(1) and num_threads() == 1


def test_the_choice_is_the_faster_of_the_measured_and_has_the_threads() -> None:
    before = torch.get_num_threads()
    try:
        choice = choose_cpu_product([(512, 640), (640, 512)], num_threads=2)
        assert choice.product is {"torch": linear_ref, "openblas": linear_openblas}[choice.name]
        assert torch.get_num_threads() == (2 if choice.name == "torch" else 1)
        if choice.name == "openblas":
            times = choice.milliseconds
            assert math.prod(times["openblas"].values()) < math.prod(times["torch"].values())
        assert torch.equal(
            choice.product(torch.eye(3), torch.ones(2, 3), None, torch.empty(3, 2)), torch.ones(3, 2)
        )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("shape", "num_threads"), [((4096, 4096), 64), ((96, 64), 2)])
def test_on_many_cores_and_for_tiny_models_torch_is_taken_untried(
    shape: tuple[int, int], num_threads: int
) -> None:
    before = torch.get_num_threads()
    try:
        choice = choose_cpu_product([shape], num_threads=num_threads)
        assert (choice.name, choice.product, choice.milliseconds) == ("torch", linear_ref, {})
        assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
