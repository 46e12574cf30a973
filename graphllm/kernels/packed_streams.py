"""Packed weights (`packed_weight.py`) streamed past rows of x, for kernels that multiply.

    on matrix units:  sums_{n,t} = sum_k weight_{n,k} * x_{t,k}, the weight rounded to x's dtype
    on CUDA cores:    sums_{t,n} = sum_g scale_{n,g} * (sum_{k in g} value_{n,k} * x_{t,k}
                                                        - zero_{n,g} * sum_{k in g} x_{t,k})

A scale of a whole row is left to the end in both, so the first then multiplies codes, which are exact. What
a thread needs of x for its 16 bytes of codes are two runs of neighbours, for the low halves and the high.

The first tile of codes is loaded before the wait for the kernel before, as in `skinny_linear.py`, and used
last. Owns the two loops, and no operation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphllm.kernels.packed_tiles import (
    BLOCK_BYTES,
    code_fields,
    code_pointers,
    code_values,
    field_factors,
    load_codes,
    load_scales,
    plain_tile,
)
from graphllm.kernels.triton_support import dot, release_successor, wait_for_predecessor, widen


@triton.jit
def _features(first, BITS: tl.constexpr, BYTES: tl.constexpr):
    """The columns of the low halves of BYTES bytes from column `first` on: [BYTES]."""
    positions = tl.arange(0, BYTES)
    if BITS == 8:
        return first + positions
    return first + (positions // BLOCK_BYTES) * (2 * BLOCK_BYTES) + positions % BLOCK_BYTES


@triton.jit
def _load_x(
    x, row_offsets, columns, order, IN_FEATURES: tl.constexpr, IS_WHOLE: tl.constexpr, HAS_ORDER: tl.constexpr
):
    """x of some rows [.., 1] at columns [1, ..] of the codes; zeros behind the last."""
    is_column = columns < IN_FEATURES
    features = columns
    if HAS_ORDER:
        features = tl.load(order + columns, mask=is_column, other=0)
    if IS_WHOLE:
        return tl.load(x + row_offsets + features)
    return tl.load(x + row_offsets + features, mask=is_column, other=0.0)


@triton.jit
def stream_packed_dot(
    x,
    row_offsets,
    codes,
    scales,
    zeros,
    order,
    codebook,
    weight_rows,
    first_column,
    IN_FEATURES: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    ZERO: tl.constexpr,
    CODEBOOK: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    SCALES_SUMS: tl.constexpr,
    HAS_WORDS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    NUM_WEIGHT_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Products of weights' rows `weight_rows` [NUM_WEIGHT_ROWS] int64 with x's rows at `row_offsets` [ROWS]
    int64, over NUM_TILES tiles of BLOCK_K columns from `first_column`: [NUM_WEIGHT_ROWS, ROWS] float32.

    Waits for the predecessor with PDL, and releases the successor. SPAN: see `span_of`.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    PER_BYTE: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = BLOCK_K // PER_BYTE
    SPAN_BYTES: tl.constexpr = SPAN // PER_BYTE
    NUM_SPANS: tl.constexpr = BLOCK_K // SPAN
    codes_at, units, ROW_UNITS = code_pointers(
        codes, weight_rows, IN_FEATURES, BITS, HAS_WORDS, NUM_SPANS, SPAN_BYTES
    )
    first_codes = load_codes(codes_at, units, first_column, ROW_UNITS, BITS, HAS_WORDS, IS_WHOLE)
    wait_for_predecessor(PDL)
    release_successor(PDL)
    sums = tl.zeros((NUM_WEIGHT_ROWS, ROWS), tl.float32)
    for tile in tl.range(1, NUM_TILES, num_stages=NUM_STAGES):
        first = first_column + tile * BLOCK_K
        tile_codes = load_codes(codes_at, units, first, ROW_UNITS, BITS, HAS_WORDS, IS_WHOLE)
        columns = _features(first, BITS, BYTES)[None, :]
        low_x = _load_x(x, row_offsets[:, None], columns, order, IN_FEATURES, IS_WHOLE, HAS_ORDER)
        low, high = plain_tile(
            tile_codes,
            scales,
            zeros,
            codebook,
            weight_rows,
            first,
            IN_FEATURES,
            BITS,
            GROUP,
            ZEROS,
            ZERO,
            CODEBOOK,
            SCALES_SUMS,
            HAS_WORDS,
            NUM_WEIGHT_ROWS,
            SPAN,
            NUM_SPANS,
            dtype,
        )
        sums = dot(low, tl.trans(low_x), sums)
        if BITS == 4:
            high_columns = columns + BLOCK_BYTES
            high_x = _load_x(x, row_offsets[:, None], high_columns, order, IN_FEATURES, IS_WHOLE, HAS_ORDER)
            sums = dot(high, tl.trans(high_x), sums)
    columns = _features(first_column, BITS, BYTES)[None, :]
    low_x = _load_x(x, row_offsets[:, None], columns, order, IN_FEATURES, IS_WHOLE, HAS_ORDER)
    low, high = plain_tile(
        first_codes,
        scales,
        zeros,
        codebook,
        weight_rows,
        first_column,
        IN_FEATURES,
        BITS,
        GROUP,
        ZEROS,
        ZERO,
        CODEBOOK,
        SCALES_SUMS,
        HAS_WORDS,
        NUM_WEIGHT_ROWS,
        SPAN,
        NUM_SPANS,
        dtype,
    )
    sums = dot(low, tl.trans(low_x), sums)
    if BITS == 4:
        high_columns = columns + BLOCK_BYTES
        high_x = _load_x(x, row_offsets[:, None], high_columns, order, IN_FEATURES, IS_WHOLE, HAS_ORDER)
        sums = dot(high, tl.trans(high_x), sums)
    if SCALES_SUMS:
        sums *= load_scales(scales + weight_rows)[:, None]
    return sums


@triton.jit
def _multiply_block(
    tile,
    x,
    row_offsets,
    scales,
    zeros,
    order,
    codebook,
    weight_rows,
    first,
    sums,
    IN_FEATURES: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    ZERO: tl.constexpr,
    CODEBOOK: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    SCALES_SUMS: tl.constexpr,
    HAS_WORDS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    NUM_WEIGHT_ROWS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
):
    """sums [ROWS, NUM_WEIGHT_ROWS, NUM_BLOCKS] + the products of codes [NUM_WEIGHT_ROWS, NUM_BLOCKS, ..]."""
    COLUMNS: tl.constexpr = BLOCK_BYTES * (8 // BITS)
    blocks = first + tl.arange(0, NUM_BLOCKS) * COLUMNS
    columns = (blocks[:, None] + tl.arange(0, BLOCK_BYTES)[None, :])[None, None, :, :]
    offsets = row_offsets[:, None, None, None]
    low_x = widen(_load_x(x, offsets, columns, order, IN_FEATURES, IS_WHOLE, HAS_ORDER))
    x_sums = low_x
    if BITS == 4:
        high_x = widen(_load_x(x, offsets, columns + BLOCK_BYTES, order, IN_FEATURES, IS_WHOLE, HAS_ORDER))
        x_sums += high_x
    if HAS_WORDS:
        low_x *= field_factors(BLOCK_BYTES, 0)[None, None, None, :]
        low = code_fields(tile, BITS, 0, NUM_WEIGHT_ROWS, NUM_BLOCKS, BLOCK_BYTES)
    elif BITS == 8:
        low = code_values(tile, codebook, CODEBOOK)
    else:
        low = code_values(tile & 15, codebook, CODEBOOK)
    products = low[None, :, :, :] * low_x
    if BITS == 4:
        if HAS_WORDS:
            high_x *= field_factors(BLOCK_BYTES, 1)[None, None, None, :]
            high = code_fields(tile, BITS, 1, NUM_WEIGHT_ROWS, NUM_BLOCKS, BLOCK_BYTES)
        else:
            high = code_values(tile >> 4, codebook, CODEBOOK)
        products += high[None, :, :, :] * high_x
    parts = tl.sum(products, 3)
    NUM_GROUPS: tl.constexpr = 1 if GROUP == 0 else (IN_FEATURES + GROUP - 1) // GROUP
    if GROUP == 0:
        groups = weight_rows[:, None]
    else:
        groups = weight_rows[:, None] * NUM_GROUPS + tl.minimum(blocks // GROUP, NUM_GROUPS - 1)[None, :]
    ADDED: tl.constexpr = ZERO + (128 if HAS_WORDS and BITS == 8 else 0)
    if ZEROS == "integer":
        parts -= (widen(tl.load(zeros + groups)) + ADDED)[None, :, :] * tl.sum(x_sums, 3)
    elif ADDED != 0:
        parts -= ADDED * tl.sum(x_sums, 3)
    if not SCALES_SUMS:
        parts *= load_scales(scales + groups)[None, :, :]
        if ZEROS == "offset":
            parts += widen(tl.load(zeros + groups))[None, :, :] * tl.sum(x_sums, 3)
    return sums + parts


@triton.jit
def stream_packed_gemv(
    x,
    row_offsets,
    codes,
    scales,
    zeros,
    order,
    codebook,
    weight_rows,
    first_column,
    IN_FEATURES: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    ZERO: tl.constexpr,
    CODEBOOK: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    SCALES_SUMS: tl.constexpr,
    HAS_WORDS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    NUM_WEIGHT_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """The same on CUDA cores, for few rows: [ROWS, NUM_WEIGHT_ROWS] float32."""
    PER_BYTE: tl.constexpr = 8 // BITS
    NUM_BLOCKS: tl.constexpr = BLOCK_K // (PER_BYTE * BLOCK_BYTES)
    codes_at, units, ROW_UNITS = code_pointers(
        codes, weight_rows, IN_FEATURES, BITS, HAS_WORDS, NUM_BLOCKS, BLOCK_BYTES
    )
    first_codes = load_codes(codes_at, units, first_column, ROW_UNITS, BITS, HAS_WORDS, IS_WHOLE)
    wait_for_predecessor(PDL)
    release_successor(PDL)
    sums = tl.zeros((ROWS, NUM_WEIGHT_ROWS, NUM_BLOCKS), tl.float32)
    for tile in tl.range(1, NUM_TILES, num_stages=NUM_STAGES):
        first = first_column + tile * BLOCK_K
        tile_codes = load_codes(codes_at, units, first, ROW_UNITS, BITS, HAS_WORDS, IS_WHOLE)
        sums = _multiply_block(
            tile_codes,
            x,
            row_offsets,
            scales,
            zeros,
            order,
            codebook,
            weight_rows,
            first,
            sums,
            IN_FEATURES,
            BITS,
            GROUP,
            ZEROS,
            ZERO,
            CODEBOOK,
            HAS_ORDER,
            SCALES_SUMS,
            HAS_WORDS,
            IS_WHOLE,
            NUM_WEIGHT_ROWS,
            NUM_BLOCKS,
        )
    sums = _multiply_block(
        first_codes,
        x,
        row_offsets,
        scales,
        zeros,
        order,
        codebook,
        weight_rows,
        first_column,
        sums,
        IN_FEATURES,
        BITS,
        GROUP,
        ZEROS,
        ZERO,
        CODEBOOK,
        HAS_ORDER,
        SCALES_SUMS,
        HAS_WORDS,
        IS_WHOLE,
        NUM_WEIGHT_ROWS,
        NUM_BLOCKS,
    )
    sums = tl.sum(sums, 2)
    if SCALES_SUMS:
        sums *= load_scales(scales + weight_rows)[None, :]
    return sums
