"""Products of packed weights on a CPU against the plain weight's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphllm.kernels import packed_cpu
from graphllm.kernels.linear import linear_ref
from graphllm.kernels.packed_cpu import (
    CpuPackedProduct,
    cpu_packed_product,
    integer_linear,
    multiplies_exactly,
    sliced_linear,
    two_bytes,
)
from graphllm.kernels.packed_linear import packed_linear_ref
from graphllm.kernels.packed_weight import PackedWeight, dequantize
from tests.quant.packed_forms import FORMS, random_weight

PER_ROW = FORMS["8 bits, whole rows"]


def exactly(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    products = x.double() @ dequantize(weight).double().t()
    return products if bias is None else products + bias.double()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", FORMS)
def test_product_of_every_form_is_that_of_its_plain_weight(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(packed_cpu, "_SLICE_BYTES", 4 * 160 * 8)  # slices of 8 rows, the last of 5
    weight, x = random_weight(FORMS[name], 37, 160), torch.randn(rows, 160)
    bias = torch.randn(37) if rows == 3 else None
    out = torch.full((rows, 37), torch.nan)
    assert cpu_packed_product(linear_ref)(x, weight, bias, out) is out
    torch.testing.assert_close(out.double(), exactly(x, weight, bias), rtol=2e-4, atol=2e-4)
    by_reference = packed_linear_ref(x, weight, bias, torch.empty_like(out))
    torch.testing.assert_close(out, by_reference, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["4 bits, offsets", "8 bits, groups of 16"])
def test_slices_give_what_the_whole_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, x = random_weight(FORMS[name], 37, 160), torch.randn(5, 160)
    whole = sliced_linear(x, weight, None, torch.empty(5, 37), plain=linear_ref)
    monkeypatch.setattr(packed_cpu, "_SLICE_BYTES", 4 * 160 * 10)
    torch.testing.assert_close(sliced_linear(x, weight, None, torch.empty(5, 37), plain=linear_ref), whole)


def test_a_row_of_x_keeps_sixteen_bits_and_zeros_stay_zeros() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 300) * torch.tensor([1e-20, 1e-6, 1.0, 30.0, 1e6, 0.0])[:, None]
    x[2, 7] = 1e3  # an outlier makes the row's unit larger
    octets, units = two_bytes(x)
    high, low = octets.double().view(2, 6, 300)
    found = (256 * high + low) * units.double()
    assert (found - x.double()).abs().amax(1).le(0.503 * units[:, 0].double()).all()
    assert not found[5].any()
    assert high.abs().max() == 127


integers = pytest.mark.skipif(not multiplies_exactly(), reason="this processor saturates 8-bit products")


@integers
@pytest.mark.parametrize("rows", [1, 2, 7, 40])
def test_integer_product_is_that_of_the_rounded_row(rows: int) -> None:
    torch.manual_seed(0)
    weight = random_weight(PER_ROW, 70, 580)
    x, bias = torch.randn(rows, 580), torch.randn(70)
    ours = integer_linear(x, weight, bias, torch.empty(rows, 70))
    difference = (ours.double() - exactly(x, weight, bias)).abs().max()
    assert difference < 2e-4
    octets, units = two_bytes(x)
    high, low = octets.double().view(2, rows, 580)
    rounded = (256 * high + low) * units.double()
    torch.testing.assert_close(ours.double(), exactly(rounded, weight, bias), rtol=1e-5, atol=2e-6)


@integers
def test_integer_product_of_a_row_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    weight, x = random_weight(PER_ROW, 70, 580), torch.randn(33, 580)
    together = integer_linear(x, weight, None, torch.empty(33, 70))
    for row in (0, 17, 32):
        alone = integer_linear(x[row : row + 1], weight, None, torch.empty(1, 70))
        assert torch.equal(alone[0], together[row])


@integers
def test_largest_numbers_do_not_overflow() -> None:
    in_features = 70_000
    codes = torch.full((2, in_features), 127, dtype=torch.int8)
    codes[1] = -128
    weight = PackedWeight(PER_ROW, in_features, codes, torch.ones(2, 1))
    x = torch.ones(2, in_features)
    x[1] = -1.0
    out = integer_linear(x, weight, None, torch.empty(2, 2))
    expected = torch.tensor([[127.0, -128.0], [-127.0, 128.0]]) * in_features
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=0.0)


def test_where_integers_saturate_the_weight_is_dequantized() -> None:
    torch.manual_seed(0)
    weight, x = random_weight(PER_ROW, 37, 160), torch.randn(2, 160)
    product = CpuPackedProduct(linear_ref, exact_integers=False)
    expected = packed_linear_ref(x, weight, None, torch.empty(2, 37))
    torch.testing.assert_close(product(x, weight, None, torch.empty(2, 37)), expected, rtol=1e-5, atol=1e-5)
