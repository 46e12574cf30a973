"""The packed form itself: what goes in comes out, and what it means."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from graphllm.kernels.packed_weight import (
    PackedFormat,
    PackedWeight,
    dequantize,
    pack_codes,
    scale_values,
    unpack_codes,
)
from tests.quant.packed_forms import E2M1, FORMS, random_codes, random_weight


@pytest.mark.parametrize("in_features", [32, 96, 50, 7])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_come_out_as_they_went_in(bits: Any, in_features: int) -> None:
    form = PackedFormat(bits=bits, group_size=None)
    values = random_codes(form, 9, in_features)
    codes = pack_codes(values, bits)
    assert codes.shape == (9, form.num_code_bytes(in_features)) and codes.dtype == form.code_dtype
    assert torch.equal(unpack_codes(codes, bits, columns=in_features).long(), values)


def plainly(weight: PackedWeight, codes: torch.Tensor) -> torch.Tensor:
    """The formula, number by number."""
    form, plain = weight.format, torch.zeros(codes.shape, dtype=torch.float64)
    group_size = form.group_size or weight.in_features
    for row, column in torch.cartesian_prod(*(torch.arange(size) for size in codes.shape)).tolist():
        value = int(codes[row, column])
        number = float(value) if form.codebook is None else form.codebook[value]
        group = column // group_size
        scale = float(weight.scales[row, group])
        if form.scale_dtype == torch.uint8:
            scale = 2.0 ** (scale - 127)
        zero = float(form.symmetric_zero) if weight.zeros is None else float(weight.zeros[row, group])
        number = scale * number + zero if form.zeros == "offset" else scale * (number - zero)
        feature = column if weight.order is None else int(weight.order[0, column])
        plain[row, feature] = number
    return plain


@pytest.mark.parametrize("name", FORMS)
def test_plain_weight_is_the_formula(name: str) -> None:
    torch.manual_seed(0)
    form = FORMS[name]
    weight = random_weight(form, 5, 160)
    codes = unpack_codes(weight.codes, form.bits, columns=160)
    torch.testing.assert_close(dequantize(weight).double(), plainly(weight, codes), rtol=1e-6, atol=1e-7)


def test_rows_are_views_that_mean_the_same_rows() -> None:
    torch.manual_seed(0)
    form = PackedFormat(bits=4, group_size=32, zeros="integer", num_orders=3)
    weight = random_weight(form, 12, 64)
    whole = dequantize(weight)
    for first, count in ((0, 4), (4, 4), (9, 2)):
        rows = weight.rows(first, count)
        assert torch.equal(dequantize(rows), whole[first : first + count])
        assert rows.codes.untyped_storage().data_ptr() == weight.codes.untyped_storage().data_ptr()
    with pytest.raises(AssertionError, match="more than one input order"):
        weight.rows(3, 2)


def test_powers_of_two_are_exact_to_both_ends() -> None:
    scales = scale_values(torch.tensor([0, 1, 126, 127, 128, 254], dtype=torch.uint8))
    assert scales.tolist() == [2.0**-127, 2.0**-126, 0.5, 1.0, 2.0, 2.0**127]


def test_last_group_of_a_row_may_be_shorter() -> None:
    form = PackedFormat(bits=8, group_size=32)
    weight = PackedWeight(form, 40, torch.ones(1, 40, dtype=torch.int8), torch.tensor([[1.0, 2.0]]).half())
    assert dequantize(weight).tolist() == [[1.0] * 32 + [2.0] * 8]


WRONG: dict[str, dict[str, Any]] = {
    "weights of 3 bits": {"bits": 3, "group_size": 32},
    "groups of 16": {"bits": 4, "group_size": 16},
    "groups of 40": {"bits": 8, "group_size": 40},
    "groups of 0": {"bits": 8, "group_size": 0},
    "scales of torch.int8": {"bits": 8, "group_size": 32, "scale_dtype": torch.int8},
    "a codebook has 16 values": {"bits": 8, "group_size": 32, "codebook": E2M1},
    "offsets are of the scales' type": {
        "bits": 4,
        "group_size": 32,
        "zeros": "offset",
        "scale_dtype": torch.uint8,
    },
}


@pytest.mark.parametrize("complaint", WRONG)
def test_forms_that_do_not_exist_are_refused(complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        PackedFormat(**WRONG[complaint])


def test_bytes_of_a_packed_weight_are_those_that_a_product_reads() -> None:
    weight = random_weight(FORMS["4 bits, offsets"], 64, 320)
    assert weight.num_bytes == 64 * (160 + 10 * 2 * 2)
    assert math.isclose(8 * weight.num_bytes / (64 * 320), 5.0)
