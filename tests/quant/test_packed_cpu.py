"""Products of packed weights on a CPU against the plain weight's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from graphllm.kernels import packed_cpu
from graphllm.kernels.linear import linear_ref
from graphllm.kernels.packed_cpu import (
    CpuPackedProduct,
    chooses_integers,
    integer_linear,
    library_form,
    library_linear,
    multiplies_exactly,
    sliced_linear,
    takes_library,
    two_bytes,
)
from graphllm.kernels.packed_linear import packed_linear_ref
from graphllm.kernels.packed_weight import PackedWeight, dequantize
from tests.quant.packed_forms import FORMS, random_weight

PER_ROW = FORMS["8 bits, whole rows"]


def with_library_form(weight: PackedWeight) -> PackedWeight:
    """The weight with what torch's product needs, where there is one for 4 bits."""
    prepared = library_form(weight)
    if prepared is None:
        return weight
    return replace(weight, library_codes=prepared[0], library_scales=prepared[1])


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
    assert CpuPackedProduct(linear_ref, has_integers=multiplies_exactly())(x, weight, bias, out) is out
    # Where integers saturate, whole rows of 8 bits are multiplied in bfloat16.
    tolerance = 0.02 if takes_library(weight) and not multiplies_exactly() else 2e-4
    torch.testing.assert_close(out.double(), exactly(x, weight, bias), rtol=tolerance, atol=tolerance)
    sliced = sliced_linear(x, weight, bias, torch.empty_like(out), plain=linear_ref)
    by_reference = packed_linear_ref(x, weight, bias, torch.empty_like(out))
    torch.testing.assert_close(sliced, by_reference, rtol=1e-4, atol=1e-5)


LIBRARY_FORMS = ("4 bits, symmetric", "4 bits, integer zeros", "4 bits, offsets", "8 bits, whole rows")


@pytest.mark.parametrize("name", LIBRARY_FORMS)
def test_products_in_bfloat16_are_the_same_whatever_the_number_of_rows(name: str) -> None:
    torch.manual_seed(0)
    weight = with_library_form(random_weight(FORMS[name], 48, 320))
    assert takes_library(weight)
    x, bias = torch.randn(300, 320), torch.randn(48)
    together = library_linear(x, weight, bias, torch.empty(300, 48))
    size = (together - bias).abs().max().item()
    # To the bit: a sum in another order would round to other neighbours, and a model makes much of that.
    for count in (1, 20, 150):
        parts = [library_linear(rows, weight, bias, torch.empty(count, 48)) for rows in x.split(count)]
        assert torch.equal(torch.cat(parts), together)
    torch.testing.assert_close(together.double(), exactly(x, weight, bias), rtol=0, atol=size / 40)
    plainly = exactly(x, weight, bias).float()
    assert not torch.equal(together - bias, plainly - bias)
    assert torch.equal((together - bias).bfloat16().float() + bias, together), "y is rounded as well"


def test_what_torch_has_no_product_for_is_not_prepared() -> None:
    for name in set(FORMS) - set(LIBRARY_FORMS) - {"4 bits, in another order"}:
        assert library_form(random_weight(FORMS[name], 48, 320)) is None
    offsets = FORMS["4 bits, offsets"]
    assert library_form(random_weight(offsets, 40, 320)) is None  # rows that are no whole blocks
    assert library_form(random_weight(offsets, 48, 300)) is None  # a shorter last group


def test_order_of_the_input_reaches_torch_s_product() -> None:
    torch.manual_seed(0)
    weight = with_library_form(random_weight(FORMS["4 bits, in another order"], 48, 320))
    assert takes_library(weight)
    x, out = torch.randn(2, 320), torch.empty(2, 48)
    CpuPackedProduct(linear_ref, has_integers=False)(x, weight, None, out)
    torch.testing.assert_close(
        out.double(), exactly(x, weight, None), rtol=0, atol=out.abs().max().item() / 40
    )


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


def test_where_integers_saturate_the_product_is_torch_s() -> None:
    torch.manual_seed(0)
    weight, x = random_weight(PER_ROW, 37, 160), torch.randn(2, 160)
    product = CpuPackedProduct(linear_ref, has_integers=False)
    expected = library_linear(x, weight, None, torch.empty(2, 37))
    assert torch.equal(product(x, weight, None, torch.empty(2, 37)), expected)


@integers
def test_one_trial_that_a_neighbour_spoils_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the same model might answer otherwise after the next start."""
    for outcomes, expected in (([False, True], True), ([False] * 4, False)):
        trials = iter(outcomes)
        monkeypatch.setattr(packed_cpu, "_integers_are_worth_it", lambda trials=trials: next(trials))
        assert chooses_integers.__wrapped__() is expected
    assert next(trials, None) is None


def test_choice_among_arithmetics_is_made_once() -> None:
    assert chooses_integers() is chooses_integers()
    assert multiplies_exactly() or not chooses_integers()
