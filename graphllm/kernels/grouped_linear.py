"""The products of a mixture of experts: each pair of a token and an expert by that expert's weights.

    a_p     = f(W_gate,e x_t + b_gate,e, W_up,e x_t + b_up,e),  p = (t, i) a pair, e its expert
    y_p     = w_p * (W_down,e a_p + b_down,e)

An expert's pairs lie in tiles (`moe_tiles.py`), and a program multiplies one tile by a slice of its expert's
rows on matrix units. Results are stored by pair, so the tiles' order is seen by nobody else, and `moe_sum.py`
adds the results of a token in the order of its choices.

Owns the two products in this form. The form for a token or a few is `grouped_gemv.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from graphllm.kernels.linear import LinearProduct, linear_ref
from graphllm.kernels.moe_tiles import ExpertTiles
from graphllm.kernels.skinny_linear import load_tile
from graphllm.kernels.triton_support import (
    dot,
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
    widen,
)


@dataclass(frozen=True, slots=True)
class TileConfig:
    """How a program cuts the weights: output columns, input features of a step of its loop, and the launch.

    Of `grouped_gated_linear` block_n counts activations, so twice as many rows of weights.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def gated_tile_config(rows_per_tile: int) -> TileConfig:
    """Few rows are all about weights in flight, many about sums that fill the registers."""
    if rows_per_tile <= 32:
        return TileConfig(64, 64, num_warps=4, num_stages=4)
    return TileConfig(64, 64, num_warps=4 if rows_per_tile == 64 else 8, num_stages=3)


def down_tile_config(rows_per_tile: int) -> TileConfig:
    """The same for `grouped_linear`."""
    if rows_per_tile <= 32:
        return TileConfig(64, 64, num_warps=4, num_stages=5)
    return TileConfig(128, 64, num_warps=4 if rows_per_tile == 64 else 8, num_stages=3)


def grouped_gated_linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts: Tensor,
    activation: ExpertActivation,
    *,
    out: Tensor,
    product: LinearProduct = linear_ref,
) -> Tensor:
    """Gates, factors and activation of every pair.

    x: [num_tokens, hidden]; weight: [num_experts, 2 * intermediate, hidden] and bias: [num_experts, 2 *
    intermediate] or None, gates first; experts: [num_tokens, top_k] int32, -1 for padding. Writes out:
    [num_tokens * top_k, intermediate] of x's dtype, but for the rows of padding, and returns it.

    Goes from expert to expert, over those that have tokens. product: the library that multiplies.
    """
    for expert, pairs in pairs_by_expert(experts):
        rows = x.index_select(0, pairs // experts.shape[1])
        gate_up = x.new_empty(len(pairs), weight.shape[1])
        product(rows, weight[expert], None if bias is None else bias[expert], gate_up)
        activated = x.new_empty(len(pairs), out.shape[1])
        out[pairs] = expert_activation_ref(gate_up, activation, out=activated)
    return out


def grouped_linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts: Tensor,
    weights: Tensor,
    *,
    out: Tensor,
    product: LinearProduct = linear_ref,
) -> Tensor:
    """Each pair's row by its expert's weights, times the pair's own weight.

    x: [num_pairs, intermediate]; weight: [num_experts, hidden, intermediate]; bias: [num_experts, hidden] or
    None; experts: [num_tokens, top_k] int32 and weights: the same in float32. Writes out: [num_pairs, hidden]
    of x's dtype, but for the rows of padding, and returns it.
    """
    for expert, pairs in pairs_by_expert(experts):
        products = x.new_empty(len(pairs), weight.shape[1])
        product(x.index_select(0, pairs), weight[expert], None if bias is None else bias[expert], products)
        out[pairs] = products.mul_(weights.flatten()[pairs, None])
    return out


def pairs_by_expert(experts: Tensor) -> list[tuple[int, Tensor]]:
    """(expert, its pairs in ascending order), for the experts that have any."""
    chosen, pairs = torch.sort(experts.flatten(), stable=True)
    used, counts = torch.unique_consecutive(chosen, return_counts=True)
    groups = zip(used.tolist(), pairs.split(counts.tolist()), strict=True)
    return [(expert, group) for expert, group in groups if expert >= 0]


@triton.jit
def _grouped_gated_kernel(
    x,  # [num_tokens, IN_FEATURES]
    weight,  # [num_experts, 2 * INTERMEDIATE, IN_FEATURES]
    bias,  # [num_experts, 2 * INTERMEDIATE] where HAS_BIAS
    tile_experts,  # [num_tiles] int32
    tile_pairs,  # [num_tiles, ROWS] int32
    out,  # [num_pairs, INTERMEDIATE]
    INTERMEDIATE: tl.constexpr,
    IN_FEATURES: tl.constexpr,
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
        tokens = tl.maximum(pairs, 0) // TOP_K
        features = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = expert.to(tl.int64) * (2 * INTERMEDIATE) + tl.minimum(features, INTERMEDIATE - 1)
        columns = tl.arange(0, BLOCK_K)[None, :]
        values_at = x + tokens.to(tl.int64)[:, None] * IN_FEATURES + columns
        gates_at = weight + rows[:, None] * IN_FEATURES + columns
        ups_at = gates_at + INTERMEDIATE * IN_FEATURES
        gate = tl.zeros((ROWS, BLOCK_N), tl.float32)
        up = tl.zeros((ROWS, BLOCK_N), tl.float32)
        IS_WHOLE: tl.constexpr = IN_FEATURES % BLOCK_K == 0
        for first in tl.range(0, IN_FEATURES, BLOCK_K, num_stages=NUM_STAGES):
            values = load_tile(values_at + first, columns + first, IN_FEATURES, IS_WHOLE, "")
            gate_rows = load_tile(gates_at + first, columns + first, IN_FEATURES, IS_WHOLE, "")
            up_rows = load_tile(ups_at + first, columns + first, IN_FEATURES, IS_WHOLE, "")
            gate = dot(values, tl.trans(gate_rows), gate)
            up = dot(values, tl.trans(up_rows), up)
        if HAS_BIAS:
            gate += widen(tl.load(bias + rows))[None, :]
            up += widen(tl.load(bias + INTERMEDIATE + rows))[None, :]
        activated = activate_pair(gate, up, ACTIVATION, ALPHA, LIMIT, out.dtype.element_ty)
        places = out + pairs.to(tl.int64)[:, None] * INTERMEDIATE + features[None, :]
        tl.store(places, activated, mask=(pairs >= 0)[:, None] & (features < INTERMEDIATE)[None, :])


@triton.jit
def _grouped_linear_kernel(
    x,  # [num_pairs, IN_FEATURES]
    weight,  # [num_experts, OUT_FEATURES, IN_FEATURES]
    bias,  # [num_experts, OUT_FEATURES] where HAS_BIAS
    weights,  # [num_pairs] float32
    tile_experts,  # [num_tiles] int32
    tile_pairs,  # [num_tiles, ROWS] int32
    out,  # [num_pairs, OUT_FEATURES]
    OUT_FEATURES: tl.constexpr,
    IN_FEATURES: tl.constexpr,
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
        features = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        rows = expert.to(tl.int64) * OUT_FEATURES + tl.minimum(features, OUT_FEATURES - 1)
        columns = tl.arange(0, BLOCK_K)[None, :]
        values_at = x + tl.maximum(pairs, 0).to(tl.int64)[:, None] * IN_FEATURES + columns
        weights_at = weight + rows[:, None] * IN_FEATURES + columns
        sums = tl.zeros((ROWS, BLOCK_N), tl.float32)
        IS_WHOLE: tl.constexpr = IN_FEATURES % BLOCK_K == 0
        for first in tl.range(0, IN_FEATURES, BLOCK_K, num_stages=NUM_STAGES):
            values = load_tile(values_at + first, columns + first, IN_FEATURES, IS_WHOLE, "")
            weight_rows = load_tile(weights_at + first, columns + first, IN_FEATURES, IS_WHOLE, "")
            sums = dot(values, tl.trans(weight_rows), sums)
        if HAS_BIAS:
            sums += widen(tl.load(bias + rows))[None, :]
        sums *= tl.load(weights + pairs, mask=is_pair, other=0.0)[:, None]
        places = out + pairs.to(tl.int64)[:, None] * OUT_FEATURES + features[None, :]
        mask = is_pair[:, None] & (features < OUT_FEATURES)[None, :]
        tl.store(places, sums.to(out.dtype.element_ty), mask=mask)


def grouped_gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts: Tensor,
    activation: ExpertActivation,
    *,
    tiles: ExpertTiles,
    out: Tensor,
) -> Tensor:
    """See `grouped_gated_linear_ref`; tiles: those of `experts`. The kernel needs all tensors contiguous."""
    if not runs_triton(x):
        return grouped_gated_linear_ref(x, weight, bias, experts, activation, out=out)
    (_, rows, in_features), intermediate = weight.shape, out.shape[1]
    assert rows == 2 * intermediate and x.shape[1] == in_features and len(out) == experts.numel()
    assert x.dtype == weight.dtype == out.dtype
    assert x.is_contiguous() and weight.is_contiguous() and out.is_contiguous()
    config = gated_tile_config(tiles.rows_per_tile)
    # Tiles vary fastest: those of an expert follow each other, and find its slice of weights in L2.
    _grouped_gated_kernel[(tiles.num_tiles, triton.cdiv(intermediate, config.block_n))](
        x,
        weight,
        x if bias is None else bias,
        tiles.experts,
        tiles.pairs,
        out,
        INTERMEDIATE=intermediate,
        IN_FEATURES=in_features,
        TOP_K=experts.shape[1],
        HAS_BIAS=bias is not None,
        **activation_constants(activation),
        ROWS=tiles.rows_per_tile,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(x.device),
    )
    return out


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts: Tensor,
    weights: Tensor,
    *,
    tiles: ExpertTiles,
    out: Tensor,
) -> Tensor:
    """See `grouped_linear_ref`; tiles: those of `experts`. The kernel needs all tensors contiguous."""
    if not runs_triton(x):
        return grouped_linear_ref(x, weight, bias, experts, weights, out=out)
    _, out_features, in_features = weight.shape
    assert x.shape == (experts.numel(), in_features) and out.shape == (experts.numel(), out_features)
    assert x.dtype == weight.dtype == out.dtype and weights.dtype == torch.float32
    assert all(tensor.is_contiguous() for tensor in (x, weight, weights, out))
    config = down_tile_config(tiles.rows_per_tile)
    _grouped_linear_kernel[(tiles.num_tiles, triton.cdiv(out_features, config.block_n))](
        x,
        weight,
        x if bias is None else bias,
        weights,
        tiles.experts,
        tiles.pairs,
        out,
        OUT_FEATURES=out_features,
        IN_FEATURES=in_features,
        HAS_BIAS=bias is not None,
        ROWS=tiles.rows_per_tile,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(x.device),
    )
    return out
