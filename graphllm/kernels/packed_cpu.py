"""Products of packed weights on a CPU: which arithmetic, and which library does it.

    integers: y_{t,n} = scale_n a_t (256 H_{t,n} + L_{t,n}),  H = h W^T, L = l W^T in int32,
              round(x_{t,k} / a_t) = 256 h_{t,k} + l_{t,k},  a_t = max_k |x_{t,k}| / 32512
    bfloat16: y = bf16(sum_k bf16(x_k) * w_k), with w's scale and zero in bfloat16, sums in float32
    plain:    the weight is made plain, a slice that stays in the processor's cache at a time

Integers are for weights of 8 bits with a scale a row, where the processor multiplies bytes without
saturating (with VNNI it does; with AVX2 alone it does not) and was measured not to be slow at it: a row of x
is cut into two bytes, so it keeps 16 bits, and sums are exact whatever else is in the batch. Otherwise 8 and
4 bits go through torch's products of bfloat16 with packed weights, whatever the number of rows. Plain slices
would be faster for 500 rows and more, by a third, but sums in another order round to other neighbours in
bfloat16, and in a whole model that grows to some percent of a logit: what is in a step beside a row must not
change the row. What torch has no product for is plain.

Owns these products and the choice among them. The specification is `packed_linear.py`'s reference.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from graphllm.kernels.linear import LinearProduct
from graphllm.kernels.packed_weight import PackedFormat, PackedWeight, dequantize, scale_values, unpack_codes

# (x [num_rows, in_features], weight, bias [out_features] or None, out [num_rows, out_features]) -> out
PackedProduct = Callable[[Tensor, PackedWeight, Tensor | None, Tensor], Tensor]

_LARGEST = 32512
"""256 * 127: the largest number whose high byte is at most 127 when it is rounded."""
# 1.5 * 2 ** 23: a float32 that is increased by it has the nearest integer in its lowest bits.
_ROUNDING = 12582912.0
_SMALLEST_UNIT = np.float32(1e-30)
# Plain numbers of a slice: what the second-level cache of most processors holds.
_SLICE_BYTES = 1024**2
_LIBRARY_GROUPS = (32, 64, 128, 256)
_LIBRARY_ROWS = 16
_TRIAL_ROWS = (1, 16)
_TRIAL_SHAPE = (2048, 1024)
_TRIAL_ROUNDS = 4
# A busy neighbour makes a trial worse for either; one that is won says what the processor can do.
_MAX_TRIALS = 4
# Of the product of both times.
_WORTH_OF_EXACTNESS = 4.0


def two_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [num_rows, in_features] float32 -> (high bytes and then low ones [2 * num_rows, in_features] int8,
    a row's unit [num_rows, 1] float32). A row of zeros has zeros, whatever its unit.

    By numpy, whose calls cost half as much as torch's where rows are few.
    """
    numbers = x.numpy()
    num_rows, in_features = numbers.shape
    units = np.maximum.reduce(np.abs(numbers), axis=1, keepdims=True)
    units *= np.float32(1 / _LARGEST)
    np.maximum(units, _SMALLEST_UNIT, out=units)
    rounded = numbers / units
    rounded += np.float32(_ROUNDING + 128)
    bits = rounded.view(np.int32)
    bits ^= 128  # the low byte counts from 128: taking that off makes it signed, and the high byte is right
    octets = bits.view(np.int8).reshape(num_rows, in_features, 4)
    pair = np.empty((2, num_rows, in_features), np.int8)
    pair[0], pair[1] = octets[:, :, 1], octets[:, :, 0]
    return torch.from_numpy(pair.reshape(2 * num_rows, in_features)), torch.from_numpy(units)


def integer_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> Tensor:
    """`packed_linear_ref` for weights that `takes_integers`, in float32."""
    num_rows = len(x)
    octets, units = two_bytes(x)
    sums = torch._int_mm(octets, weight.codes.t()).float()
    torch.add(sums[num_rows:], sums[:num_rows], alpha=256, out=out)
    out.mul_(weight.scales.view(-1)).mul_(units)
    return out if bias is None else out.add_(bias)


def takes_integers(form: PackedFormat) -> bool:
    """Whether `integer_linear` can multiply weights of this form."""
    return (
        form.bits == 8
        and form.group_size is None
        and form.zeros == "none"
        and form.scale_dtype == torch.float32
        and not form.num_orders
    )


def takes_library(weight: PackedWeight) -> bool:
    """Whether torch has a product of bfloat16 with the weight, 4 bits once it is prepared."""
    form = weight.format
    if form.bits == 8:
        return form.group_size is None and form.zeros == "none" and form.scale_dtype != torch.uint8
    return weight.library_codes is not None


def library_form(weight: PackedWeight) -> tuple[Tensor, Tensor] | None:
    """`library_codes` and `library_scales` for a weight of 4 bits, None where torch has no product for it.

    The second is [num_groups, out_features, 2] bfloat16, scale and zero of w = (code - 8) * scale + zero.
    """
    form, groups = weight.format, weight.scales.shape[1]
    is_known = form.bits == 4 and form.codebook is None and form.group_size in _LIBRARY_GROUPS
    is_whole = weight.out_features % _LIBRARY_ROWS == 0 and weight.in_features == groups * (
        form.group_size or 0
    )
    if not is_known or not is_whole:
        return None
    codes = unpack_codes(weight.codes, 4, columns=weight.in_features).int()
    scales = scale_values(weight.scales)
    if weight.zeros is None:
        zeros = scales * (8 - form.symmetric_zero)
    elif form.zeros == "offset":
        zeros = weight.zeros.float() + 8 * scales
    else:
        zeros = scales * (8 - weight.zeros.float())
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed, torch.stack((scales, zeros), 2).transpose(0, 1).contiguous().bfloat16()


def library_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> Tensor:
    """`packed_linear_ref` for weights that `takes_library`, in the arithmetic of bfloat16."""
    form, rounded = weight.format, x.bfloat16()
    if form.bits == 8:
        scales = weight.scales.view(-1).bfloat16()
        out.copy_(torch.ops.aten._weight_int8pack_mm(rounded, weight.codes, scales))
    else:
        codes, grid = weight.library_codes, weight.library_scales
        out.copy_(torch.ops.aten._weight_int4pack_mm_for_cpu(rounded, codes, form.group_size, grid))
    return out if bias is None else out.add_(bias)


def plain_rows(weight: PackedWeight, out: Tensor) -> Tensor:
    """`dequantize` into out [out_features, in_features] float32, in few passes where the form is simple."""
    form = weight.format
    group_size, groups = form.group_size or weight.in_features, weight.scales.shape[1]
    if form.codebook is not None or weight.order is not None or weight.in_features != groups * group_size:
        return out.copy_(dequantize(weight))
    if form.bits == 8:
        out.copy_(weight.codes)
    else:
        if group_size % 32:
            return out.copy_(dequantize(weight))
        blocks = weight.codes.view(len(out), -1, 16)
        halves = out.view(len(out), -1, 2, 16)
        halves[:, :, 0], halves[:, :, 1] = blocks & 15, blocks >> 4
    numbers, scales = out.view(len(out), groups, group_size), scale_values(weight.scales)[:, :, None]
    if form.zeros == "offset":
        assert weight.zeros is not None
        numbers.mul_(scales).add_(weight.zeros.float()[:, :, None])
    else:
        zeros = form.symmetric_zero if weight.zeros is None else weight.zeros.float()[:, :, None]
        numbers.sub_(zeros).mul_(scales)
    return out


def sliced_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor, *, plain: LinearProduct
) -> Tensor:
    """`packed_linear_ref`, some rows of the weight at a time."""
    out_features, in_features = weight.out_features, weight.in_features
    rows_per_slice = min(out_features, max(1, _SLICE_BYTES // (4 * in_features)))
    memory = torch.empty(rows_per_slice, in_features)
    for first in range(0, out_features, rows_per_slice):
        count = min(rows_per_slice, out_features - first)
        numbers = plain_rows(weight.rows(first, count), memory[:count]).to(x.dtype)
        own_bias = None if bias is None else bias[first : first + count]
        part = out if count == out_features else torch.empty(len(x), count, dtype=out.dtype)
        plain(x, numbers, own_bias, part)
        if part is not out:
            out[:, first : first + count] = part
    return out


@dataclass(frozen=True, slots=True)
class CpuPackedProduct:
    """A PackedProduct: by integers where `has_integers` and the form allow it, else as torch can.

    `plain` multiplies plain weights.
    """

    plain: LinearProduct
    has_integers: bool

    def __call__(self, x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> Tensor:
        if weight.order is not None and len(weight.order) == 1:
            x, weight = x.index_select(1, weight.order[0]), replace(weight, order=None)
        if self.has_integers and takes_integers(weight.format) and x.dtype == out.dtype == torch.float32:
            return integer_linear(x, weight, bias, out)
        if takes_library(weight):
            return library_linear(x, weight, bias, out)
        return sliced_linear(x, weight, bias, out, plain=self.plain)


def multiplies_exactly() -> bool:
    """Whether torch multiplies 8-bit integers here without saturating on the way, as old processors do."""
    x = torch.full((3, 256), 127, dtype=torch.int8)
    x[1:] = -128
    weight = torch.full((64, 256), 127, dtype=torch.int8)
    weight[::2] = -128
    expected = x.long() @ weight.t().long()
    rows = (x[:1], x)  # one row takes another way than several
    return all(torch.equal(torch._int_mm(some, weight.t()).long(), expected[: len(some)]) for some in rows)


@functools.cache
def chooses_integers() -> bool:
    """Whether weights of 8 bits are multiplied as integers on this processor: where that is exact, and for 1
    and 16 rows together not much slower than in bfloat16. Measured once, in some milliseconds."""
    return multiplies_exactly() and any(_integers_are_worth_it() for _ in range(_MAX_TRIALS))


def _integers_are_worth_it() -> bool:
    """The outcome of one trial."""
    out_features, in_features = _TRIAL_SHAPE
    form = PackedFormat(bits=8, group_size=None, scale_dtype=torch.float32)
    codes = torch.ones(out_features, in_features, dtype=torch.int8)
    weight = PackedWeight(form, in_features, codes, torch.ones(out_features, 1))
    costs = []
    for product in (integer_linear, library_linear):
        cost = 1.0
        for num_rows in _TRIAL_ROWS:
            x, out = torch.ones(num_rows, in_features), torch.empty(num_rows, out_features)
            cost *= min(_seconds(product, x, weight, out) for _ in range(_TRIAL_ROUNDS))
        costs.append(cost)
    return costs[0] <= _WORTH_OF_EXACTNESS * costs[1]


def _seconds(product: PackedProduct, x: Tensor, weight: PackedWeight, out: Tensor) -> float:
    began = time.perf_counter()
    product(x, weight, None, out)
    return time.perf_counter() - began


def cpu_packed_product(plain: LinearProduct) -> CpuPackedProduct:
    """The products of this processor; `plain` multiplies what was made plain."""
    return CpuPackedProduct(plain, chooses_integers())
