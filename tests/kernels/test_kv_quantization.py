from __future__ import annotations

import bisect
import itertools

import pytest
import torch

from graphllm.kernels.kv_quantization import LARGEST_STORED, dequantize_kv_ref, quantize_kv_ref

FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]


def numbers_of(dtype: torch.dtype) -> list[float]:
    """Every finite number of an 8-bit format that quantization may give, ascending."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(dtype).float()
    limit = LARGEST_STORED[dtype]
    return sorted({float(value) for value in values if abs(value) <= limit})


def nearest(x: float, numbers: list[float], dtype: torch.dtype) -> float:
    """The nearest of `numbers`; of two equally near, the one whose last bit is 0."""
    at = bisect.bisect_left(numbers, x)
    candidates = numbers[max(at - 1, 0) : at + 1]
    distance = min(abs(x - number) for number in candidates)
    best = [number for number in candidates if abs(x - number) == distance]
    if len(best) == 1:
        return best[0]
    codes = torch.tensor(best).to(dtype).view(torch.uint8).tolist()
    return next(number for number, code in zip(best, codes, strict=True) if code % 2 == 0)


@pytest.mark.parametrize("dtype", FORMATS)
def test_elements_are_rounded_to_the_nearest_and_ties_to_even(dtype: torch.dtype) -> None:
    numbers = numbers_of(dtype)
    middles = [(low + high) / 2 for low, high in itertools.pairwise(numbers)]
    middle = torch.tensor(middles)
    x = torch.cat(
        (
            torch.tensor([LARGEST_STORED[dtype]]),  # so that the scale is 1
            torch.tensor(numbers),
            middle,
            torch.nextafter(middle, torch.tensor(torch.inf)),
            torch.nextafter(middle, torch.tensor(-torch.inf)),
        )
    )
    stored, scale = quantize_kv_ref(x, dtype)
    assert scale == 1.0
    assert stored.float().tolist() == [nearest(value, numbers, dtype) for value in x.tolist()]


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_largest_element_of_a_head_is_stored_as_the_largest_number(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(4000, 3) * torch.logspace(-20, 20, 4000)[:, None]
    stored, scale = quantize_kv_ref(x, dtype)
    assert (stored.float().abs().amax(dim=-1) == LARGEST_STORED[dtype]).all()
    assert torch.equal(scale, (x.abs().amax(dim=-1).double() / LARGEST_STORED[dtype]).float())


@pytest.mark.parametrize(
    ("dtype", "relative", "absolute"),
    [(torch.float8_e4m3fn, 2**-4, 2**-10), (torch.float8_e5m2, 2**-3, 2**-17), (torch.int8, 0.0, 0.5)],
)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_meant_is_within_half_a_step(
    dtype: torch.dtype, relative: float, absolute: float, source: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(5, 2, 80) * torch.tensor([0.01, 30.0])[:, None]).to(source)
    stored, scale = quantize_kv_ref(x, dtype)
    assert stored.shape == x.shape and stored.dtype == dtype
    assert scale.shape == (5, 2) and scale.dtype == torch.float32
    error = (dequantize_kv_ref(stored, scale) - x.float()).abs()
    allowed = x.float().abs() * relative + scale[..., None] * absolute
    assert (error <= allowed * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_head_of_zeros_stays_zeros_beside_others(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 4)
    x[1] = torch.tensor([1.0, -2.0, 0.5, 0.0])
    stored, scale = quantize_kv_ref(x, dtype)
    assert scale[0] == 0 and scale[1] > 0 and scale[2] == 0
    meant = dequantize_kv_ref(stored, scale)
    assert (meant[0] == 0).all() and (meant[2] == 0).all()
    assert meant[1, 1] == pytest.approx(-2.0, rel=1e-6)


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_head_that_is_almost_zero_stays_finite_and_small(dtype: torch.dtype) -> None:
    x = torch.tensor([[1e-37, 0.0, -1e-38], [1e-45, 0.0, 0.0]])
    stored, scale = quantize_kv_ref(x, dtype)
    meant = dequantize_kv_ref(stored, scale)
    assert meant.isfinite().all()
    assert (meant.abs() <= 2e-37).all()
