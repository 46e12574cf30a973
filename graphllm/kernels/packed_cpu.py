"""Products of packed weights on a CPU: which library does them, and in which arithmetic.

    integers: y_{t,n} = scale_n a_t (256 H_{t,n} + L_{t,n}),  H = h W^T, L = l W^T in int32,
              round(x_{t,k} / a_t) = 256 h_{t,k} + l_{t,k},  a_t = max_k |x_{t,k}| / 32512

Weights of 8 bits with a scale a row are multiplied as integers where the processor does it exactly: a row of
x is cut into two bytes, so it keeps 16 bits, and sums are exact whatever else is in the batch. Everything
else is dequantized, a slice of rows that stays in the processor's cache at a time, and multiplied by the
product of plain weights.

Owns these products and the choice among them. The specification is `packed_linear.py`'s reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graphllm.kernels.linear import LinearProduct
from graphllm.kernels.packed_weight import PackedWeight, dequantize

# (x [num_rows, in_features], weight, bias [out_features] or None, out [num_rows, out_features]) -> out
PackedProduct = Callable[[Tensor, PackedWeight, Tensor | None, Tensor], Tensor]

_LARGEST = 32512
"""256 * 127: the largest whose high byte is not 128."""
# 1.5 * 2 ** 23: a float32 that is increased by it has the nearest integer in its lowest bits.
_ROUNDING = 12582912.0
_SLICE_BYTES = 1024**2


def multiplies_exactly() -> bool:
    """Whether torch multiplies 8-bit integers here without saturating on the way, as old processors do."""
    x = torch.full((3, 256), 127, dtype=torch.int8)
    x[1:] = -128
    weight = torch.full((64, 256), 127, dtype=torch.int8)
    weight[::2] = -128
    expected = x.long() @ weight.t().long()
    rows = (x[:1], x)  # one row takes another way than several
    return all(torch.equal(torch._int_mm(some, weight.t()).long(), expected[: len(some)]) for some in rows)


def two_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [num_rows, in_features] float32 -> (high bytes and then low ones [2 * num_rows, in_features] int8,
    a row's unit [num_rows, 1] float32). A row of zeros has zeros, whatever its unit."""
    num_rows, in_features = x.shape
    units = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True).clamp_(min=1e-30).div_(_LARGEST)
    rounded = x.div(units).add_(_ROUNDING + 128.0)
    # Now the low byte counts from 128: taking that off makes it signed, and the high byte is right.
    octets = rounded.view(torch.int32).bitwise_xor_(128).view(torch.int8).view(num_rows, in_features, 4)
    pair = torch.empty(2, num_rows, in_features, dtype=torch.int8)
    pair[0], pair[1] = octets[:, :, 1], octets[:, :, 0]
    return pair.view(2 * num_rows, in_features), units


def integer_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> Tensor:
    """`packed_linear_ref` for 8-bit codes with one scale a row and no zeros, float32, by integer products."""
    num_rows = len(x)
    octets, units = two_bytes(x)
    sums = torch._int_mm(octets, weight.codes.t())
    out.copy_(sums[num_rows:]).add_(sums[:num_rows], alpha=256)
    out.mul_(weight.scales.view(-1)).mul_(units)
    return out if bias is None else out.add_(bias)


def takes_integers(weight: PackedWeight) -> bool:
    """Whether `integer_linear` can multiply it."""
    form = weight.format
    return (
        form.bits == 8
        and weight.scales.shape[1] == 1
        and form.zeros == "none"
        and form.scale_dtype == torch.float32
        and weight.order is None
    )


@dataclass(frozen=True, slots=True)
class CpuPackedProduct:
    """A PackedProduct: integers where `exact_integers` and the form allow it, else slices by `plain`."""

    plain: LinearProduct
    exact_integers: bool

    def __call__(self, x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> Tensor:
        if self.exact_integers and x.dtype == torch.float32 and takes_integers(weight):
            return integer_linear(x, weight, bias, out)
        return sliced_linear(x, weight, bias, out, plain=self.plain)


def sliced_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor, *, plain: LinearProduct
) -> Tensor:
    """`packed_linear_ref`, some rows of the weight at a time."""
    rows_per_slice = max(1, _SLICE_BYTES // (4 * weight.in_features))
    if rows_per_slice >= weight.out_features or (weight.order is not None and len(weight.order) > 1):
        return plain(x, dequantize(weight, dtype=x.dtype), bias, out)
    for first in range(0, weight.out_features, rows_per_slice):
        count = min(rows_per_slice, weight.out_features - first)
        plain_rows = dequantize(weight.rows(first, count), dtype=x.dtype)
        part = torch.empty(len(x), count, dtype=out.dtype)
        own_bias = None if bias is None else bias[first : first + count]
        out[:, first : first + count] = plain(x, plain_rows, own_bias, part)
    return out


def cpu_packed_product(plain: LinearProduct) -> CpuPackedProduct:
    """The products of this processor; `plain` multiplies what was dequantized."""
    return CpuPackedProduct(plain, multiplies_exactly())
