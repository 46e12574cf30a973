"""A matrix in 4 or 8 bits a number: codes, and for each group of a row's neighbours a scale and a zero.

    weight_{n,k} = scale_{n,g} * (value(code_{n,k}) - zero_{n,g}),   g = k // group_size
    weight_{n,k} = scale_{n,g} * value(code_{n,k}) + offset_{n,g}    with additive zeros

value is the code itself, or the entry of a codebook that it names. With an input order, column k of the codes
belongs to input feature order_k, so that groups are neighbours whatever features they are made of.

Codes of 8 bits are int8, -128 to 127. Codes of 4 bits are 0 to 15 and two to a byte: byte j of a block of 16
holds code j of its 32 columns in the low half, and code j + 16 in the high one. So the halves of what one
16-byte load brings are two runs of neighbours in one group, and no kernel has to shuffle them.

Owns the form: what may stand in it, how codes get into it and out of it. `dequantize` is the specification
of what a packed weight means. Chooses no codes (`quant/`), multiplies nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Zeros = Literal["none", "integer", "offset"]

BLOCK_COLUMNS = 32
"""Columns of 4-bit codes that share 16 bytes; a row of them is padded to whole blocks."""
SMALLEST_GROUP = {4: BLOCK_COLUMNS, 8: 16}
SYMMETRIC_ZERO = {4: 8, 8: 0}
"""The zero of a format without stored zeros, by bits."""
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.uint8)
"""uint8 is e8m0: the scale is 2 ** (byte - 127), and 255, which is NaN, does not occur."""

_SMALLEST_POWER = 1 << 22  # the bits of 2 ** -127


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFormat:
    """How a matrix is packed.

    bits: 4 or 8. group_size: columns that share a scale, a multiple of 32 (8 bits: of 16), or None for a
    whole row. zeros: none (the zero is 8 for 4 bits, 0 for 8 bits and with a codebook), integers (uint8 for
    4 bits, int8 for 8 bits), or offsets that are added, of scale_dtype. scale_dtype: float16, bfloat16,
    float32, or uint8 for powers of two (e8m0). codebook: the 16 values of the 4-bit codes. num_orders: 0, or
    how many input orders there are, each of as many rows as the others.

    Raises ValueError for a form that does not exist.
    """

    bits: Literal[4, 8]
    group_size: int | None
    zeros: Zeros = "none"
    scale_dtype: torch.dtype = torch.float16
    codebook: tuple[float, ...] | None = None
    num_orders: int = 0

    def __post_init__(self) -> None:
        if self.bits not in SMALLEST_GROUP:
            raise ValueError(f"weights of {self.bits} bits: only 4 and 8 are packed")
        smallest = SMALLEST_GROUP[self.bits]
        if self.group_size is not None and (self.group_size < smallest or self.group_size % smallest):
            raise ValueError(
                f"groups of {self.group_size}: {self.bits}-bit codes have groups of a multiple of {smallest}"
            )
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scales of {self.scale_dtype}: only {SCALE_DTYPES} are understood")
        if self.codebook is not None and (
            self.bits != 4 or len(self.codebook) != 16 or self.zeros == "integer"
        ):
            raise ValueError("a codebook has 16 values, for codes of 4 bits without integer zeros")
        if self.zeros == "offset" and self.scale_dtype == torch.uint8:
            raise ValueError("offsets are of the scales' type, and no power of two is negative")

    def num_groups(self, in_features: int) -> int:
        """Groups of a row; the last may be shorter."""
        return 1 if self.group_size is None else -(-in_features // self.group_size)

    def num_code_bytes(self, in_features: int) -> int:
        """Bytes of a row's codes, padding included."""
        return in_features if self.bits == 8 else -(-in_features // BLOCK_COLUMNS) * (BLOCK_COLUMNS // 2)

    @property
    def code_dtype(self) -> torch.dtype:
        """What codes are stored as."""
        return torch.int8 if self.bits == 8 else torch.uint8

    @property
    def zero_dtype(self) -> torch.dtype:
        """What zeros are stored as, where there are any."""
        return self.scale_dtype if self.zeros == "offset" else self.code_dtype

    @property
    def symmetric_zero(self) -> int:
        """The zero of every group where none are stored."""
        return 0 if self.codebook is not None or self.zeros != "none" else SYMMETRIC_ZERO[self.bits]

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The tensors of a packed matrix: name to shape and dtype, of those that this format has."""
        groups = self.num_groups(in_features)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((out_features, self.num_code_bytes(in_features)), self.code_dtype),
            "scales": ((out_features, groups), self.scale_dtype),
        }
        if self.zeros != "none":
            shapes["zeros"] = ((out_features, groups), self.zero_dtype)
        if self.num_orders:
            shapes["order"] = ((self.num_orders, in_features), torch.int32)
        if self.codebook is not None:
            shapes["codebook"] = ((len(self.codebook),), torch.float32)
        return shapes


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A packed matrix [out_features, in_features], or views of the rows of one.

    codes: [out_features, num_code_bytes]; scales and zeros: [out_features, num_groups]; order: [num_orders,
    in_features] int32, the input feature of each column; codebook: [16] float32. All contiguous.
    library_codes, library_scales: the same once more as torch's CPU product wants it, where it was prepared
    (`packed_cpu.py`); never of a part of the rows.
    """

    format: PackedFormat
    in_features: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    order: Tensor | None = None
    codebook: Tensor | None = None
    library_codes: Tensor | None = None
    library_scales: Tensor | None = None

    @property
    def out_features(self) -> int:
        return len(self.codes)

    @property
    def num_bytes(self) -> int:
        """What one pass over the matrix reads."""
        tensors = (self.codes, self.scales, self.zeros, self.order)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def rows(self, first: int, count: int) -> PackedWeight:
        """`count` rows from `first` on, over the same memory; with several orders, within those of one."""
        end, order = first + count, self.order
        if order is not None and len(order) > 1:
            rows_per_order = self.out_features // len(order)
            index = first // rows_per_order
            assert end <= (index + 1) * rows_per_order, "the rows are of more than one input order"
            order = order[index : index + 1]
        return replace(
            self,
            codes=self.codes[first:end],
            scales=self.scales[first:end],
            zeros=None if self.zeros is None else self.zeros[first:end],
            order=order,
            library_codes=None,
            library_scales=None,
        )


def pack_codes(values: Tensor, bits: int) -> Tensor:
    """Integers [rows, columns] of any integer dtype, 0 to 15 or -128 to 127, as a format stores them.

    Returns [rows, num_code_bytes] uint8 (4 bits; what pads a row is 0) or int8 (8 bits), contiguous.
    """
    if bits == 8:
        return values.to(torch.int8).contiguous()
    rows, columns = values.shape
    codes = values.to(torch.uint8)
    if padding := -columns % BLOCK_COLUMNS:
        codes = torch.nn.functional.pad(codes, (0, padding))
    halves = codes.reshape(rows, -1, 2, BLOCK_COLUMNS // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(rows, -1)


def unpack_codes(codes: Tensor, bits: int, *, columns: int) -> Tensor:
    """The integers that `pack_codes` packed: [rows, columns], uint8 for 4 bits and int8 for 8."""
    if bits == 8:
        return codes
    blocks = codes.reshape(len(codes), -1, 1, BLOCK_COLUMNS // 2)
    return torch.cat((blocks & 15, blocks >> 4), 2).reshape(len(codes), -1)[:, :columns]


def scale_values(scales: Tensor) -> Tensor:
    """Scales of any of SCALE_DTYPES as float32."""
    if scales.dtype != torch.uint8:
        return scales.float()
    # The byte is a float32's exponent; only the smallest is no normal number.
    exponents = scales.int() << 23
    return torch.where(exponents == 0, _SMALLEST_POWER, exponents).view(torch.float32)


def dequantize(weight: PackedWeight, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The plain matrix [out_features, in_features], its columns in the order of the input features.

    Computed in float32 as the formulas above have it, and rounded once to `dtype`.
    """
    form, columns = weight.format, weight.in_features
    values = unpack_codes(weight.codes, form.bits, columns=columns)
    numbers = values.float() if weight.codebook is None else weight.codebook[values.int()]
    group_size = form.group_size or columns
    scales = _spread(scale_values(weight.scales), group_size, columns)
    if weight.zeros is None:
        numbers = (numbers - form.symmetric_zero) * scales
    elif form.zeros == "offset":
        numbers = numbers * scales + _spread(weight.zeros.float(), group_size, columns)
    else:
        numbers = (numbers - _spread(weight.zeros.float(), group_size, columns)) * scales
    if weight.order is not None:
        rows_of_order = numbers.view(len(weight.order), -1, columns)
        index = weight.order.long()[:, None].expand_as(rows_of_order)
        numbers = torch.empty_like(rows_of_order).scatter_(2, index, rows_of_order).view(-1, columns)
    return numbers.to(dtype)


def _spread(values: Tensor, group_size: int, columns: int) -> Tensor:
    """A value of each group as one of each column."""
    return values[:, :, None].expand(-1, -1, group_size).reshape(len(values), -1)[:, :columns]
