"""The products of a mixture of experts in 8 bits (`scaled_linear.py`), in tiles on matrix units.

    a_p = f(gate, up),  of the pair's token, whose row is quantized once for all of its experts
    y_p = w_p * (W_down,e a_p + b_down,e)

as in `grouped_linear.py`, with activations and weights in e4m3 or int8 and their scales. An expert's gate
and up rows alternate in a tile, so that both factors of an output are one thread's.

Owns the two products in this form, and their references. The form for a token or a few is
`scaled_grouped_gemv.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.expert_activation import ExpertActivation, activate_pair, activation_constants
from graphllm.kernels.grouped_linear import (
    down_tile_config,
    gated_tile_config,
    grouped_gated_linear_ref,
    grouped_linear_ref,
)
from graphllm.kernels.linear import LinearProduct, linear_ref
from graphllm.kernels.moe_tiles import ExpertTiles
from graphllm.kernels.quantize_rows import dequantize_rows_ref
from graphllm.kernels.scaled_linear import ScaledRows, ScaledWeight, scale_rows, scaled_sums, tile_width
from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
    widen,
)


def scaled_grouped_gated_ref(
    x: ScaledRows,
    weight: ScaledWeight,
    bias: Tensor | None,
    experts: Tensor,
    activation: ExpertActivation,
    *,
    num_experts: int,
    out: Tensor,
    product: LinearProduct = linear_ref,
) -> Tensor:
    """`grouped_gated_linear_ref` of the numbers that x and weight stand for, in float32.

    x: of num_tokens rows; weight: the rows of all experts, gates first in each; bias: [num_experts, 2 *
    intermediate] or None. Writes out: [num_tokens * top_k, intermediate] of any floating dtype, but for the
    rows of padding, and returns it.
    """
    stack = weight.dequantized().view(num_experts, -1, weight.values.shape[1])
    numbers = dequantize_rows_ref(x.values, x.scales, weight.group_size)
    results = out.float()
    own_bias = None if bias is None else bias.float()
    grouped_gated_linear_ref(numbers, stack, own_bias, experts, activation, out=results, product=product)
    return out.copy_(results)


def scaled_grouped_linear_ref(
    x: ScaledRows,
    weight: ScaledWeight,
    bias: Tensor | None,
    experts: Tensor,
    weights: Tensor,
    *,
    num_experts: int,
    out: Tensor,
    product: LinearProduct = linear_ref,
) -> Tensor:
    """`grouped_linear_ref` of the numbers that x (a row a pair) and weight stand for, in float32."""
    stack = weight.dequantized().view(num_experts, -1, weight.values.shape[1])
    numbers = dequantize_rows_ref(x.values, x.scales, weight.group_size)
    results = out.float()
    own_bias = None if bias is None else bias.float()
    grouped_linear_ref(numbers, stack, own_bias, experts, weights, out=results, product=product)
    return out.copy_(results)


@triton.jit
def _scaled_grouped_gated_kernel(
    x,  # [num_tokens, IN_FEATURES]
    x_scales,  # [num_tokens, num_groups] float32
    weight,  # [NUM_ROWS, IN_FEATURES], 2 * INTERMEDIATE rows an expert
    weight_scales,  # [num_groups, NUM_ROWS] float32
    bias,  # [NUM_ROWS] where HAS_BIAS
    tile_experts,  # [num_tiles] int32
    tile_pairs,  # [num_tiles, ROWS] int32
    out,  # [num_pairs, INTERMEDIATE]
    NUM_ROWS: tl.constexpr,
    INTERMEDIATE: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    GROUP: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    release_successor(PDL)
    tile = tl.program_id(0)
    expert = tl.load(tile_experts + tile)
    if expert >= 0:
        pairs = tl.load(tile_pairs + tile * ROWS + tl.arange(0, ROWS))
        # Empty rows compute token 0 again, and store nothing.
        tokens = (tl.maximum(pairs, 0) // TOP_K).to(tl.int64)
        first_feature = tl.program_id(1) * BLOCK_N
        rows = tl.arange(0, 2 * BLOCK_N)
        features = tl.minimum(first_feature + rows // 2, INTERMEDIATE - 1)
        weight_rows = expert.to(tl.int64) * (2 * INTERMEDIATE) + (rows % 2) * INTERMEDIATE + features
        sums = scaled_sums(
            x,
            x_scales,
            tokens,
            weight,
            weight_scales,
            weight_rows,
            0,
            IN_FEATURES,
            GROUP,
            NUM_ROWS,
            (IN_FEATURES + BLOCK_K - 1) // BLOCK_K,
            IN_FEATURES % BLOCK_K == 0,
            ROWS,
            2 * BLOCK_N,
            BLOCK_K,
            NUM_STAGES,
            False,
            False,
        )
        numbers = scale_rows(sums, x_scales, tokens, weight_scales, weight_rows, GROUP)
        if HAS_BIAS:
            numbers += widen(tl.load(bias + weight_rows))[None, :]
        gate, up = tl.split(tl.reshape(numbers, (ROWS, BLOCK_N, 2)))
        activated = activate_pair(gate, up, ACTIVATION, ALPHA, LIMIT, out.dtype.element_ty)
        stored = first_feature + tl.arange(0, BLOCK_N)
        places = out + (pairs.to(tl.int64) * INTERMEDIATE)[:, None] + stored[None, :]
        tl.store(places, activated, mask=(pairs >= 0)[:, None] & (stored < INTERMEDIATE)[None, :])


@triton.jit
def _scaled_grouped_linear_kernel(
    x,  # [num_pairs, IN_FEATURES]
    x_scales,  # [num_pairs, num_groups] float32
    weight,  # [NUM_ROWS, IN_FEATURES], OUT_FEATURES rows an expert
    weight_scales,  # [num_groups, NUM_ROWS] float32
    bias,  # [NUM_ROWS] where HAS_BIAS
    weights,  # [num_pairs] float32
    tile_experts,  # [num_tiles] int32
    tile_pairs,  # [num_tiles, ROWS] int32
    out,  # [num_pairs, OUT_FEATURES]
    NUM_ROWS: tl.constexpr,
    OUT_FEATURES: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
        x_rows = tl.maximum(pairs, 0).to(tl.int64)
        features = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        weight_rows = expert.to(tl.int64) * OUT_FEATURES + tl.minimum(features, OUT_FEATURES - 1)
        sums = scaled_sums(
            x,
            x_scales,
            x_rows,
            weight,
            weight_scales,
            weight_rows,
            0,
            IN_FEATURES,
            GROUP,
            NUM_ROWS,
            (IN_FEATURES + BLOCK_K - 1) // BLOCK_K,
            IN_FEATURES % BLOCK_K == 0,
            ROWS,
            BLOCK_N,
            BLOCK_K,
            NUM_STAGES,
            False,
            False,
        )
        numbers = scale_rows(sums, x_scales, x_rows, weight_scales, weight_rows, GROUP)
        if HAS_BIAS:
            numbers += widen(tl.load(bias + weight_rows))[None, :]
        numbers *= tl.load(weights + pairs, mask=is_pair, other=0.0)[:, None]
        places = out + (pairs.to(tl.int64) * OUT_FEATURES)[:, None] + features[None, :]
        mask = is_pair[:, None] & (features < OUT_FEATURES)[None, :]
        tl.store(places, numbers.to(out.dtype.element_ty), mask=mask)


def scaled_grouped_gated(
    x: ScaledRows,
    weight: ScaledWeight,
    bias: Tensor | None,
    experts: Tensor,
    activation: ExpertActivation,
    *,
    num_experts: int,
    tiles: ExpertTiles,
    out: Tensor,
) -> Tensor:
    """See `scaled_grouped_gated_ref`; tiles: those of `experts`. The kernel needs all tensors contiguous."""
    if not runs_triton(out):
        return scaled_grouped_gated_ref(
            x, weight, bias, experts, activation, num_experts=num_experts, out=out
        )
    (num_rows, in_features), intermediate = weight.values.shape, out.shape[1]
    assert num_rows == num_experts * 2 * intermediate and len(out) == experts.numel()
    check_scaled_operands(x, weight, out)
    config = gated_tile_config(tiles.rows_per_tile)
    # Tiles vary fastest: those of an expert follow each other, and find its slice of weights in L2.
    _scaled_grouped_gated_kernel[(tiles.num_tiles, triton.cdiv(intermediate, config.block_n))](
        x.values,
        x.scales,
        weight.values,
        weight.scales,
        x.scales if bias is None else bias,
        tiles.experts,
        tiles.pairs,
        out,
        NUM_ROWS=num_rows,
        INTERMEDIATE=intermediate,
        IN_FEATURES=in_features,
        GROUP=weight.group_size or 0,
        TOP_K=experts.shape[1],
        HAS_BIAS=bias is not None,
        **activation_constants(activation),
        ROWS=tiles.rows_per_tile,
        BLOCK_N=config.block_n,
        BLOCK_K=tile_width(in_features, weight.group_size, largest=128),
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(out.device),
    )
    return out


def scaled_grouped_linear(
    x: ScaledRows,
    weight: ScaledWeight,
    bias: Tensor | None,
    experts: Tensor,
    weights: Tensor,
    *,
    num_experts: int,
    tiles: ExpertTiles,
    out: Tensor,
) -> Tensor:
    """See `scaled_grouped_linear_ref`; tiles: those of `experts`. The kernel needs all tensors contiguous."""
    if not runs_triton(out):
        return scaled_grouped_linear_ref(x, weight, bias, experts, weights, num_experts=num_experts, out=out)
    num_rows, in_features = weight.values.shape
    out_features = num_rows // num_experts
    assert len(x.values) == experts.numel() and out.shape == (experts.numel(), out_features)
    check_scaled_operands(x, weight, out)
    config = down_tile_config(tiles.rows_per_tile)
    _scaled_grouped_linear_kernel[(tiles.num_tiles, triton.cdiv(out_features, config.block_n))](
        x.values,
        x.scales,
        weight.values,
        weight.scales,
        x.scales if bias is None else bias,
        weights,
        tiles.experts,
        tiles.pairs,
        out,
        NUM_ROWS=num_rows,
        OUT_FEATURES=out_features,
        IN_FEATURES=in_features,
        GROUP=weight.group_size or 0,
        HAS_BIAS=bias is not None,
        ROWS=tiles.rows_per_tile,
        BLOCK_N=config.block_n,
        BLOCK_K=tile_width(in_features, weight.group_size, largest=128),
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(out.device),
    )
    return out


def check_scaled_operands(x: ScaledRows, weight: ScaledWeight, out: Tensor) -> None:
    """Of one format and width, and contiguous as kernels need them."""
    assert x.values.dtype == weight.values.dtype and x.values.shape[1] == weight.values.shape[1]
    tensors = (x.values, x.scales, weight.values, weight.scales, out)
    assert all(tensor.is_contiguous() for tensor in tensors)
