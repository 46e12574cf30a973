"""A packed weight (`packed_weight.py`) made plain on a card, and its product with many rows.

Owns the kernel that writes plain numbers, whose reference is `dequantize`, and the product that goes through
the weight a slice of rows at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.linear import LinearProduct
from graphllm.kernels.packed_tiles import (
    code_pointers,
    load_codes,
    load_scales,
    packed_arguments,
    plain_tile,
    span_of,
)
from graphllm.kernels.packed_weight import BLOCK_COLUMNS, PackedWeight, dequantize
from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
)

SLICE_BYTES = 32 * 1024**2
"""Of plain numbers: what is written is still in the L2 cache of a large card when it is multiplied."""
_HALF: tl.constexpr = tl.constexpr(BLOCK_COLUMNS // 2)
_BLOCK_N = 16
_BLOCK_K = 256


@triton.jit
def _packed_dense_kernel(
    codes,  # [OUT_FEATURES, bytes]
    scales,  # [OUT_FEATURES, groups]
    zeros,  # [OUT_FEATURES, groups]
    order,  # [num_orders, IN_FEATURES] int32 where HAS_ORDER
    codebook,  # [16] float32
    out,  # [OUT_FEATURES, IN_FEATURES]
    OUT_FEATURES: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    ZERO: tl.constexpr,
    CODEBOOK: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    SCALES_SUMS: tl.constexpr,
    HAS_WORDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    PDL: tl.constexpr,
):
    PER_BYTE: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = BLOCK_K // PER_BYTE
    NUM_SPANS: tl.constexpr = BLOCK_K // SPAN
    SPAN_BYTES: tl.constexpr = SPAN // PER_BYTE
    features = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(features, OUT_FEATURES - 1).to(tl.int64)
    first = tl.program_id(1) * BLOCK_K
    codes_at, units, ROW_UNITS = code_pointers(
        codes, rows, IN_FEATURES, BITS, HAS_WORDS, NUM_SPANS, SPAN_BYTES
    )
    # The scratch that is written may still be read by the kernel before.
    wait_for_predecessor(PDL)
    release_successor(PDL)
    tile = load_codes(codes_at, units, first, ROW_UNITS, BITS, HAS_WORDS, IN_FEATURES % BLOCK_K == 0)
    low, high = plain_tile(
        tile,
        scales,
        zeros,
        codebook,
        rows,
        first,
        IN_FEATURES,
        BITS,
        GROUP,
        ZEROS,
        ZERO,
        CODEBOOK,
        SCALES_SUMS,
        HAS_WORDS,
        BLOCK_N,
        SPAN,
        NUM_SPANS,
        tl.float32,
    )
    if SCALES_SUMS:
        scale = load_scales(scales + rows)[:, None]
        low *= scale
        high *= scale
    places = tl.arange(0, BYTES)
    columns = first + (places if BITS == 8 else places // _HALF * (2 * _HALF) + places % _HALF)
    out_rows = out + rows[:, None] * IN_FEATURES
    is_row = (features < OUT_FEATURES)[:, None]
    dtype: tl.constexpr = out.dtype.element_ty
    stored = columns
    if HAS_ORDER:
        stored = tl.load(order + columns, mask=columns < IN_FEATURES, other=0)
    tl.store(out_rows + stored[None, :], low.to(dtype), mask=is_row & (columns < IN_FEATURES)[None, :])
    if BITS == 4:
        columns += _HALF
        stored = columns
        if HAS_ORDER:
            stored = tl.load(order + columns, mask=columns < IN_FEATURES, other=0)
        tl.store(out_rows + stored[None, :], high.to(dtype), mask=is_row & (columns < IN_FEATURES)[None, :])


def packed_dense(weight: PackedWeight, *, out: Tensor) -> Tensor:
    """`dequantize` into out: [out_features, in_features], contiguous; of at most one input order."""
    if not runs_triton(out):
        return out.copy_(dequantize(weight))
    out_features, in_features = out.shape
    assert out.is_contiguous() and out_features == weight.out_features and in_features == weight.in_features
    assert weight.order is None or len(weight.order) == 1
    _packed_dense_kernel[(triton.cdiv(out_features, _BLOCK_N), triton.cdiv(in_features, _BLOCK_K))](
        out=out,
        **packed_arguments(weight),
        OUT_FEATURES=out_features,
        BLOCK_N=_BLOCK_N,
        BLOCK_K=_BLOCK_K,
        SPAN=span_of(weight, _BLOCK_K),
        num_warps=4,
        **launch_options(out.device),
    )
    return out


def packed_dense_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    out: Tensor,
    *,
    scratch: Tensor,
    product: LinearProduct,
) -> Tensor:
    """`packed_linear_ref` for many rows: slices of the weight made plain in `scratch`, each multiplied.

    scratch: [at least in_features], of x's dtype, contiguous; a slice has as many rows as fit into it.
    """
    out_features, in_features = weight.out_features, weight.in_features
    rows_per_slice = min(out_features, scratch.numel() // in_features)
    assert rows_per_slice > 0 and scratch.dtype == x.dtype
    for first in range(0, out_features, rows_per_slice):
        count = min(rows_per_slice, out_features - first)
        plain = scratch[: count * in_features].view(count, in_features)
        packed_dense(weight.rows(first, count), out=plain)
        own_bias = None if bias is None else bias[first : first + count]
        product(x, plain, own_bias, out[:, first : first + count])
    return out
