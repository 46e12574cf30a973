"""How a kernel gets numbers out of a packed weight (`packed_weight.py`), a tile at a time.

A thread loads 16 bytes of codes, which are 32 columns of 4 bits or 16 of 8, all of one group.

Owns the arguments that kernels take for a packed weight, the loads of its codes, and their numbers. Owns no
operation.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from graphllm.kernels.packed_weight import PackedWeight
from graphllm.kernels.triton_support import widen

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The codebook of 4-bit floating-point numbers (OCP Microscaling Formats, 2023), which needs no table."""

BLOCK_BYTES: tl.constexpr = tl.constexpr(16)
# 2 ** 126: what the bits of an e2m1 number, as those of a float32, are too small by.
_E2M1_FACTOR: tl.constexpr = tl.constexpr(2.0**126)
_SMALLEST_POWER: tl.constexpr = tl.constexpr(1 << 22)


def packed_arguments(weight: PackedWeight) -> dict[str, Any]:
    """Keyword arguments for a kernel over a packed weight: its tensors, and the constants of its format.

    A tensor that the format lacks is given as the codes, and not read.
    """
    form, codes = weight.format, weight.codes
    tensors = (weight.codes, weight.scales, weight.zeros, weight.order, weight.codebook)
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    return {
        "codes": codes,
        "scales": weight.scales,
        "zeros": codes if weight.zeros is None else weight.zeros,
        "order": codes if weight.order is None else weight.order,
        "codebook": codes if weight.codebook is None else weight.codebook,
        "IN_FEATURES": weight.in_features,
        "BITS": form.bits,
        "GROUP": form.group_size or 0,
        "ZEROS": form.zeros,
        "ZERO": form.symmetric_zero,
        "CODEBOOK": "none" if form.codebook is None else "e2m1" if form.codebook == E2M1 else "table",
        "HAS_ORDER": weight.order is not None,
        "SCALES_SUMS": form.group_size is None and form.zeros != "offset",
        "HAS_WORDS": form.codebook is None and codes.shape[1] % 16 == 0,
    }


def span_of(weight: PackedWeight, block_k: int) -> int:
    """Neighbouring columns of a tile of `block_k` that surely share a scale: a power of two."""
    group_size = weight.format.group_size or block_k
    return min(block_k, group_size & -group_size)


@triton.jit
def load_scales(pointers):
    """Scales as float32; bytes are exponents."""
    loaded = tl.load(pointers)
    if loaded.dtype == tl.uint8:
        bits = loaded.to(tl.int32) << 23
        return tl.where(bits == 0, _SMALLEST_POWER, bits).to(tl.float32, bitcast=True)
    return widen(loaded)


@triton.jit
def code_values(codes, codebook, CODEBOOK: tl.constexpr):
    """What codes 0 to 15, or of 8 bits, stand for, in float32."""
    if CODEBOOK == "table":
        return tl.load(codebook + codes.to(tl.int32))
    if CODEBOOK == "e2m1":
        numbers = codes.to(tl.int32)
        bits = ((numbers & 7) << 22) | ((numbers & 8) << 28)
        return bits.to(tl.float32, bitcast=True) * _E2M1_FACTOR
    return codes.to(tl.float32)


@triton.jit
def _field_places(positions, HALF: tl.constexpr):
    """Where the fields of bytes at `positions` begin within their words."""
    return (positions % 4) * 8 + HALF * 4


@triton.jit
def code_fields(
    words,
    BITS: tl.constexpr,
    HALF: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    NUM_SPANS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """The fields of words [NUM_ROWS, NUM_SPANS, BYTES / 4] where they stand, as numbers: codes times powers
    of two, see `field_factors`, in float32 [NUM_ROWS, NUM_SPANS, BYTES]. Codes of 8 bits are larger by 128.

    That is one instruction for the bits and one for the number, where a shift and the conversion of a byte
    would be four.
    """
    if BITS == 8:
        words = words ^ 0x80808080
        field = 255
    else:
        field = 15
    masks = (tl.full((4,), field, tl.uint32) << _field_places(tl.arange(0, 4), HALF).to(tl.uint32))[
        None, None, None, :
    ]
    return tl.reshape((tl.expand_dims(words, 3) & masks).to(tl.float32), (NUM_ROWS, NUM_SPANS, BYTES))


@triton.jit
def field_factors(BYTES: tl.constexpr, HALF: tl.constexpr):
    """What turns fields of BYTES neighbouring bytes into codes: powers of two [BYTES]."""
    exponents = 127 - _field_places(tl.arange(0, BYTES), HALF)
    return (exponents << 23).to(tl.float32, bitcast=True)


@triton.jit
def plain_tile(
    tile,
    scales,
    zeros,
    codebook,
    weight_rows,
    first,
    IN_FEATURES: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    ZERO: tl.constexpr,
    CODEBOOK: tl.constexpr,
    SCALES_SUMS: tl.constexpr,
    HAS_WORDS: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    SPAN: tl.constexpr,
    NUM_SPANS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Numbers of codes `tile` [NUM_ROWS, NUM_SPANS, bytes or words] that begin at column `first`, in `dtype`:
    of the low halves and of the high ones (8 bits: twice the same), both [NUM_ROWS, NUM_SPANS * bytes].

    weight_rows: [NUM_ROWS] int64. With SCALES_SUMS they lack the scale of their row.
    """
    SPAN_BYTES: tl.constexpr = SPAN if BITS == 8 else SPAN // 2
    NUM_GROUPS: tl.constexpr = 1 if GROUP == 0 else (IN_FEATURES + GROUP - 1) // GROUP
    if GROUP == 0:
        groups = weight_rows[:, None, None]
    else:
        spans = first + tl.arange(0, NUM_SPANS)[None, :, None] * SPAN
        groups = weight_rows[:, None, None] * NUM_GROUPS + tl.minimum(spans // GROUP, NUM_GROUPS - 1)
    zero = tl.full((1, 1, 1), ZERO, tl.float32)
    if ZEROS == "integer":
        zero = widen(tl.load(zeros + groups))
    scale = tl.full((1, 1, 1), 1.0, tl.float32)
    if not SCALES_SUMS:
        scale = load_scales(scales + groups)
    if HAS_WORDS:
        zero += 128 if BITS == 8 else 0
    shift = -zero * scale
    if ZEROS == "offset":
        shift += widen(tl.load(zeros + groups))
    if HAS_WORDS:
        low_factors = field_factors(SPAN_BYTES, 0)[None, None, :]
        low = code_fields(tile, BITS, 0, NUM_ROWS, NUM_SPANS, SPAN_BYTES) * (scale * low_factors) + shift
        high = low
        if BITS == 4:
            high_factors = field_factors(SPAN_BYTES, 1)[None, None, :]
            high = (
                code_fields(tile, BITS, 1, NUM_ROWS, NUM_SPANS, SPAN_BYTES) * (scale * high_factors) + shift
            )
    elif BITS == 8:
        low = code_values(tile, codebook, CODEBOOK) * scale + shift
        high = low
    else:
        low = code_values(tile & 15, codebook, CODEBOOK) * scale + shift
        high = code_values(tile >> 4, codebook, CODEBOOK) * scale + shift
    BYTES: tl.constexpr = NUM_SPANS * SPAN_BYTES
    return tl.reshape(low.to(dtype), (NUM_ROWS, BYTES)), tl.reshape(high.to(dtype), (NUM_ROWS, BYTES))


@triton.jit
def code_pointers(
    codes,
    weight_rows,
    IN_FEATURES: tl.constexpr,
    BITS: tl.constexpr,
    HAS_WORDS: tl.constexpr,
    NUM_SPANS: tl.constexpr,
    SPAN_BYTES: tl.constexpr,
):
    """Pointers to the codes of some rows in their first columns [N, NUM_SPANS, units of a span], the units'
    positions in a row [1, NUM_SPANS, units], and how many a row has. Units are words where rows are aligned,
    else bytes."""
    BYTES_PER_UNIT: tl.constexpr = 4 if HAS_WORDS else 1
    UNITS: tl.constexpr = SPAN_BYTES // BYTES_PER_UNIT
    ROW_BYTES: tl.constexpr = IN_FEATURES if BITS == 8 else (IN_FEATURES + 31) // 32 * 16
    ROW_UNITS: tl.constexpr = ROW_BYTES // BYTES_PER_UNIT
    if HAS_WORDS:
        codes = codes.to(tl.pointer_type(tl.uint32))
    units = tl.arange(0, NUM_SPANS)[None, :, None] * UNITS + tl.arange(0, UNITS)[None, None, :]
    return codes + weight_rows[:, None, None] * ROW_UNITS + units, units, ROW_UNITS


@triton.jit
def load_codes(
    pointers,
    units,
    first_column,
    ROW_UNITS: tl.constexpr,
    BITS: tl.constexpr,
    HAS_WORDS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """The tile from column `first_column` on; zeros behind the last."""
    COLUMNS_PER_UNIT: tl.constexpr = (4 if HAS_WORDS else 1) * (8 // BITS)
    first = first_column // COLUMNS_PER_UNIT
    if IS_WHOLE:
        return tl.load(pointers + first, eviction_policy="evict_first")
    return tl.load(pointers + first, mask=first + units < ROW_UNITS, other=0, eviction_policy="evict_first")
