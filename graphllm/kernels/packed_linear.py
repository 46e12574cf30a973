"""The product of a linear layer whose weight is packed in 4 or 8 bits (`packed_weight.py`).

    y_{t,n} = sum_k x_{t,k} * weight_{n,k} + bias_n

Owns the reference.
"""

from __future__ import annotations

from torch import Tensor

from graphllm.kernels.linear import LinearProduct, linear_ref
from graphllm.kernels.packed_weight import PackedWeight, dequantize


def packed_linear_ref(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor, *, product: LinearProduct = linear_ref
) -> Tensor:
    """x: [num_rows, in_features]; bias: [out_features] or None. Writes [num_rows, out_features] into `out`,
    of x's dtype or float32, and returns it.

    The plain weight, rounded to x's dtype, by `product`.
    """
    return product(x, dequantize(weight, dtype=x.dtype), bias, out)
