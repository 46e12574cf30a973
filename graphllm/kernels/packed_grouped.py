"""The products of a mixture of experts whose weights are packed in 4 or 8 bits (`packed_weight.py`).

The formulas are those of `grouped_linear.py` and `grouped_gemv.py`. A stack of experts is one packed matrix
with the rows of expert 0, then those of expert 1, ...

For a token or a few, a program looks up its pair's expert and streams some of its rows past one row of x on
CUDA cores. With tiles of tokens (`moe_tiles.py`) it multiplies a tile on matrix units.

Owns both forms of the gated product, and the second product in tiles. Its other form, which adds up a token's
experts as well, is `packed_grouped_sum.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.expert_activation import (
    ExpertActivation,
    activate_pair,
    activation_constants,
    expert_activation_ref,
)
from graphllm.kernels.grouped_linear import pairs_by_expert
from graphllm.kernels.moe_tiles import ExpertTiles
from graphllm.kernels.packed_cpu import PackedProduct
from graphllm.kernels.packed_linear import packed_linear_ref
from graphllm.kernels.packed_streams import stream_packed_dot, stream_packed_gemv
from graphllm.kernels.packed_tiles import packed_arguments, span_of
from graphllm.kernels.packed_weight import PackedWeight
from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
    widen,
)

# A tile of weights and the launch: on CUDA cores 512 bytes of a row are 16 for each thread of a warp.
_GEMV_ROWS = 8
_GEMV_BYTES = 512
_GEMV_WARPS = 2
_DOT_ROWS = 64
_DOT_COLUMNS = 128
_NUM_STAGES = 3


def packed_grouped_gated_ref(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    experts: Tensor,
    activation: ExpertActivation,
    *,
    num_experts: int,
    out: Tensor,
    product: PackedProduct = packed_linear_ref,
) -> Tensor:
    """Gates, factors and activation of every pair.

    x: [num_tokens, hidden]; weight: num_experts times 2 * intermediate rows, gates first; bias:
    [num_experts, 2 * intermediate] or None; experts: [num_tokens, top_k] int32, -1 for padding. Writes out:
    [num_tokens * top_k, intermediate] of x's dtype, but for the rows of padding, and returns it.
    """
    rows_per_expert = weight.out_features // num_experts
    for expert, pairs in pairs_by_expert(experts):
        rows = x.index_select(0, pairs // experts.shape[1])
        gate_up = x.new_empty(len(pairs), rows_per_expert)
        own = weight.rows(expert * rows_per_expert, rows_per_expert)
        product(rows, own, None if bias is None else bias[expert], gate_up)
        activated = x.new_empty(len(pairs), out.shape[1])
        out[pairs] = expert_activation_ref(gate_up, activation, out=activated)
    return out


def packed_grouped_linear_ref(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    experts: Tensor,
    weights: Tensor,
    *,
    num_experts: int,
    out: Tensor,
    product: PackedProduct = packed_linear_ref,
) -> Tensor:
    """Each pair's row by its expert's weights, times the pair's own weight.

    x: [num_pairs, intermediate]; weight: num_experts times hidden rows; bias: [num_experts, hidden] or None;
    experts: [num_tokens, top_k] int32 and weights: the same in float32. Writes out: [num_pairs, hidden] of
    x's dtype, but for the rows of padding, and returns it.
    """
    rows_per_expert = weight.out_features // num_experts
    for expert, pairs in pairs_by_expert(experts):
        products = x.new_empty(len(pairs), rows_per_expert)
        own = weight.rows(expert * rows_per_expert, rows_per_expert)
        product(x.index_select(0, pairs), own, None if bias is None else bias[expert], products)
        out[pairs] = products.mul_(weights.flatten()[pairs, None])
    return out


@triton.jit
def _packed_gated_kernel(
    x,  # [num_tokens, IN_FEATURES]
    codes,  # [num_experts * 2 * INTERMEDIATE, bytes]
    scales,
    zeros,
    order,  # [num_experts, IN_FEATURES] int32 where HAS_ORDER
    codebook,
    bias,  # [num_experts, 2 * INTERMEDIATE] where HAS_BIAS
    experts,  # [num_tokens, TOP_K] int32, without tiles
    tile_experts,  # [num_tiles] int32, with tiles
    tile_pairs,  # [num_tiles, ROWS] int32, with tiles
    out,  # [num_tokens * TOP_K, INTERMEDIATE]
    INTERMEDIATE: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    ZERO: tl.constexpr,
    CODEBOOK: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    SCALES_SUMS: tl.constexpr,
    HAS_WORDS: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_TILES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    release_successor(PDL)
    tile = tl.program_id(0)
    if HAS_TILES:
        expert = tl.load(tile_experts + tile)
        pairs = tl.load(tile_pairs + tile * ROWS + tl.arange(0, ROWS))
    else:
        expert = tl.load(experts + tile)
        pairs = tile + tl.arange(0, ROWS)
    if expert >= 0:
        # Gates and factors alternate, so the last step is a split of neighbours.
        positions = tl.arange(0, BLOCK_N)
        features = tl.program_id(1) * (BLOCK_N // 2) + positions // 2
        rows = (positions % 2) * INTERMEDIATE + tl.minimum(features, INTERMEDIATE - 1)
        weight_rows = expert.to(tl.int64) * (2 * INTERMEDIATE) + rows
        # Empty rows compute token 0 again, and store nothing.
        row_offsets = (tl.maximum(pairs, 0) // TOP_K).to(tl.int64) * IN_FEATURES
        NUM_TILES: tl.constexpr = (IN_FEATURES + BLOCK_K - 1) // BLOCK_K
        IS_WHOLE: tl.constexpr = IN_FEATURES % BLOCK_K == 0
        if HAS_ORDER:
            order += expert.to(tl.int64) * IN_FEATURES
        if HAS_TILES:
            sums = tl.trans(
                stream_packed_dot(
                    x,
                    row_offsets,
                    codes,
                    scales,
                    zeros,
                    order,
                    codebook,
                    weight_rows,
                    0,
                    IN_FEATURES,
                    BITS,
                    GROUP,
                    ZEROS,
                    ZERO,
                    CODEBOOK,
                    HAS_ORDER,
                    SCALES_SUMS,
                    HAS_WORDS,
                    NUM_TILES,
                    IS_WHOLE,
                    ROWS,
                    BLOCK_N,
                    BLOCK_K,
                    SPAN,
                    NUM_STAGES,
                    False,
                )
            )
        else:
            sums = stream_packed_gemv(
                x,
                row_offsets,
                codes,
                scales,
                zeros,
                order,
                codebook,
                weight_rows,
                0,
                IN_FEATURES,
                BITS,
                GROUP,
                ZEROS,
                ZERO,
                CODEBOOK,
                HAS_ORDER,
                SCALES_SUMS,
                HAS_WORDS,
                NUM_TILES,
                IS_WHOLE,
                ROWS,
                BLOCK_N,
                BLOCK_K,
                NUM_STAGES,
                False,
            )
        if HAS_BIAS:
            sums += widen(tl.load(bias + weight_rows))[None, :]
        gate, up = tl.split(tl.reshape(sums, (ROWS, BLOCK_N // 2, 2)))
        activated = activate_pair(gate, up, ACTIVATION, ALPHA, LIMIT, out.dtype.element_ty)
        stored = tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)[None, :]
        places = out + pairs.to(tl.int64)[:, None] * INTERMEDIATE + stored
        tl.store(places, activated, mask=(pairs >= 0)[:, None] & (stored < INTERMEDIATE))


@triton.jit
def _packed_down_kernel(
    x,  # [num_pairs, IN_FEATURES]
    codes,  # [num_experts * OUT_FEATURES, bytes]
    scales,
    zeros,
    order,  # [num_experts, IN_FEATURES] int32 where HAS_ORDER
    codebook,
    bias,  # [num_experts, OUT_FEATURES] where HAS_BIAS
    weights,  # [num_pairs] float32
    tile_experts,  # [num_tiles] int32
    tile_pairs,  # [num_tiles, ROWS] int32
    out,  # [num_pairs, OUT_FEATURES]
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
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    release_successor(PDL)
    tile = tl.program_id(0)
    expert = tl.load(tile_experts + tile)
    if expert >= 0:
        pairs = tl.load(tile_pairs + tile * ROWS + tl.arange(0, ROWS))
        is_pair = pairs >= 0
        features = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        weight_rows = expert.to(tl.int64) * OUT_FEATURES + tl.minimum(features, OUT_FEATURES - 1)
        row_offsets = tl.maximum(pairs, 0).to(tl.int64) * IN_FEATURES
        if HAS_ORDER:
            order += expert.to(tl.int64) * IN_FEATURES
        sums = tl.trans(
            stream_packed_dot(
                x,
                row_offsets,
                codes,
                scales,
                zeros,
                order,
                codebook,
                weight_rows,
                0,
                IN_FEATURES,
                BITS,
                GROUP,
                ZEROS,
                ZERO,
                CODEBOOK,
                HAS_ORDER,
                SCALES_SUMS,
                HAS_WORDS,
                (IN_FEATURES + BLOCK_K - 1) // BLOCK_K,
                IN_FEATURES % BLOCK_K == 0,
                ROWS,
                BLOCK_N,
                BLOCK_K,
                SPAN,
                NUM_STAGES,
                False,
            )
        )
        if HAS_BIAS:
            sums += widen(tl.load(bias + weight_rows))[None, :]
        sums *= tl.load(weights + pairs, mask=is_pair, other=0.0)[:, None]
        places = out + pairs.to(tl.int64)[:, None] * OUT_FEATURES + features[None, :]
        mask = is_pair[:, None] & (features < OUT_FEATURES)[None, :]
        tl.store(places, sums.to(out.dtype.element_ty), mask=mask)


def packed_grouped_gated(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    experts: Tensor,
    activation: ExpertActivation,
    *,
    num_experts: int,
    tiles: ExpertTiles | None,
    out: Tensor,
) -> Tensor:
    """See `packed_grouped_gated_ref`; tiles: those of `experts`, None for a token or a few. The kernel needs
    all tensors contiguous."""
    if not runs_triton(x):
        return packed_grouped_gated_ref(
            x, weight, bias, experts, activation, num_experts=num_experts, out=out
        )
    intermediate = out.shape[1]
    assert weight.out_features == num_experts * 2 * intermediate and len(out) == experts.numel()
    assert x.shape[1] == weight.in_features and x.dtype == out.dtype
    assert all(tensor.is_contiguous() for tensor in (x, experts, out))
    shape = launch_shape(weight, has_tiles=tiles is not None)
    _packed_gated_kernel[
        (
            experts.numel() if tiles is None else tiles.num_tiles,
            triton.cdiv(2 * intermediate, shape["BLOCK_N"]),
        )
    ](
        x,
        bias=x if bias is None else bias,
        experts=experts,
        tile_experts=experts if tiles is None else tiles.experts,
        tile_pairs=experts if tiles is None else tiles.pairs,
        out=out,
        **packed_arguments(weight),
        INTERMEDIATE=intermediate,
        TOP_K=experts.shape[1],
        HAS_BIAS=bias is not None,
        **activation_constants(activation),
        HAS_TILES=tiles is not None,
        ROWS=1 if tiles is None else tiles.rows_per_tile,
        SPAN=span_of(weight, shape["BLOCK_K"]),
        **shape,
        **launch_options(x.device),
    )
    return out


def packed_grouped_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    experts: Tensor,
    weights: Tensor,
    *,
    num_experts: int,
    tiles: ExpertTiles,
    out: Tensor,
) -> Tensor:
    """See `packed_grouped_linear_ref`; tiles: those of `experts`. The kernel needs all tensors contiguous."""
    if not runs_triton(x):
        return packed_grouped_linear_ref(x, weight, bias, experts, weights, num_experts=num_experts, out=out)
    out_features = out.shape[1]
    assert weight.out_features == num_experts * out_features and len(out) == len(x) == experts.numel()
    assert x.shape[1] == weight.in_features and x.dtype == out.dtype and weights.dtype == torch.float32
    assert all(tensor.is_contiguous() for tensor in (x, weights, out))
    shape = launch_shape(weight, has_tiles=True)
    _packed_down_kernel[(tiles.num_tiles, triton.cdiv(out_features, shape["BLOCK_N"]))](
        x,
        bias=x if bias is None else bias,
        weights=weights,
        tile_experts=tiles.experts,
        tile_pairs=tiles.pairs,
        out=out,
        **packed_arguments(weight),
        OUT_FEATURES=out_features,
        HAS_BIAS=bias is not None,
        ROWS=tiles.rows_per_tile,
        SPAN=span_of(weight, shape["BLOCK_K"]),
        **shape,
        **launch_options(x.device),
    )
    return out


def launch_shape(weight: PackedWeight, *, has_tiles: bool) -> dict[str, Any]:
    """Keyword arguments of a launch: a program's tile of weights, its warps and stages."""
    bits = weight.format.bits
    return {
        "BLOCK_N": _DOT_ROWS if has_tiles else _GEMV_ROWS,
        "BLOCK_K": _DOT_COLUMNS if has_tiles else _GEMV_BYTES * (8 // bits),
        "NUM_STAGES": _NUM_STAGES,
        "num_stages": _NUM_STAGES,
        "num_warps": 4 if has_tiles else _GEMV_WARPS,
    }
