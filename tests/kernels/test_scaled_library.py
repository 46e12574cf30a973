"""The product through torch is that of the reference."""

from __future__ import annotations

import pytest
import torch

from graphllm.kernels.quantize_rows import quantize_rows_ref
from graphllm.kernels.scaled_library import library_works, scaled_linear_library, takes_library
from graphllm.kernels.scaled_linear import MAX_STREAMED_ROWS, ScaledRows, ScaledWeight, scaled_linear_ref

E4M3 = torch.float8_e4m3fn
MANY = MAX_STREAMED_ROWS + 1


def rows_of(num_rows: int, in_features: int) -> ScaledRows:
    values, scales = torch.empty(num_rows, in_features, dtype=E4M3), torch.empty(num_rows, 1)
    x = torch.randn(num_rows, in_features) * torch.rand(num_rows, 1)
    quantize_rows_ref(x, None, given=None, out=values, scales=scales)
    return ScaledRows(values, scales)


def test_every_row_has_its_own_scale_on_both_sides() -> None:
    torch.manual_seed(0)
    x, rows = rows_of(MANY, 64), rows_of(48, 64)
    weight = ScaledWeight(rows.values, rows.scales.t().contiguous(), None)
    out = torch.empty(MANY, 48, dtype=torch.bfloat16)
    assert takes_library(x, weight, None, out)
    expected = scaled_linear_ref(x, weight, None, torch.empty(MANY, 48))
    torch.testing.assert_close(scaled_linear_library(x, weight, out).float(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("what", ["few rows", "a bias", "groups", "float32", "odd sizes", "int8"])
def test_what_the_library_has_no_product_for_is_left_to_ours(what: str) -> None:
    num_features = 60 if what == "odd sizes" else 64
    x, rows = rows_of(1 if what == "few rows" else MANY, num_features), rows_of(48, num_features)
    values = rows.values.to(torch.int8) if what == "int8" else rows.values
    weight = ScaledWeight(values, rows.scales.t(), 32 if what == "groups" else None)
    dtype = torch.float32 if what == "float32" else torch.bfloat16
    bias = torch.zeros(48) if what == "a bias" else None
    assert not takes_library(x, weight, bias, torch.empty(len(x.values), 48, dtype=dtype))


def test_the_library_is_for_cards() -> None:
    assert not library_works(torch.device("cpu"))
