"""The product of activations and weights that both are in 8 bits, e4m3 or int8, with scales.

    y_{t,n} = s_t * S_n * sum_k q_{t,k} * Q_{n,k} + bias_n                           (one group)
    y_{t,n} = sum_g s_{t,g} * S_{n,g} * sum_{k in g} q_{t,k} * Q_{n,k} + bias_n      (groups of neighbours)

s is of the activations (`quantize_rows.py`), S of the weights. Sums within a group run on matrix units, those
of int8 in int32 and so exactly, those of e4m3 in float32; what is between groups is float32. Hopper's matrix
units keep fewer bits of a sum of 8-bit floats than float32 has, so every tile's sums join one in float32
(DeepSeek-AI, 2024, arXiv:2412.19437, section 3.3.2).

Scales of weights are stored group by group, [num_groups, out_features], so that neighbouring rows' lie side
by side; the published 128x128 blocks are repeated for each of their rows.

Owns the loop over tiles, which the products of experts share (`scaled_grouped.py`), and this product. Few
rows stream weights, split where `out_features` alone does not fill a card, as `skinny_linear.py` does it;
many rows go in tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.linear import LinearProduct, LinearWorkspace, linear_ref
from graphllm.kernels.quantize_rows import dequantize_rows_ref
from graphllm.kernels.skinny_linear import add_parts, load_tile
from graphllm.kernels.triton_support import (
    INTERPRETED,
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
    widen,
)

_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)
# Rows of the smallest product of 8-bit floats that every card's matrix units do.
_SMALLEST_FP8_ROWS: tl.constexpr = tl.constexpr(64)

MAX_STREAMED_ROWS = 64
"""Rows up to which weights are streamed, each once."""
_MAX_STREAMED: tl.constexpr = tl.constexpr(MAX_STREAMED_ROWS)
# Programs that keep a card's memory busy: two for each multiprocessor of an H100. Not measured.
_WANTED_PROGRAMS = 264
_MAX_SPLITS = 8
_MIN_TILES_A_SPLIT = 4
# Output columns of a program of the streaming form, and of tiles.
_STREAM_N, _TILE_N = 32, 128
_TILE_ROWS = 128


@dataclass(frozen=True, slots=True)
class ScaledWeight:
    """A matrix [out_features, in_features] in 8 bits.

    values: that, e4m3 or int8. scales: [num_groups, out_features] float32. group_size: input features of a
    scale, None for all of them. All contiguous.
    """

    values: Tensor
    scales: Tensor
    group_size: int | None

    def dequantized(self) -> Tensor:
        """The plain matrix in float32."""
        return dequantize_rows_ref(self.values, self.scales.t(), self.group_size)


@dataclass(frozen=True, slots=True)
class ScaledRows:
    """values: [num_rows, in_features], e4m3 or int8. scales: [num_rows, num_groups] float32."""

    values: Tensor
    scales: Tensor


@dataclass(frozen=True, slots=True)
class ScaledConfig:
    """How a program cuts the product: rows, output columns, input features of a step; and the launch."""

    rows: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


def scaled_linear_ref(
    x: ScaledRows,
    weight: ScaledWeight,
    bias: Tensor | None,
    out: Tensor,
    *,
    product: LinearProduct = linear_ref,
) -> Tensor:
    """Writes [num_rows, out_features] into `out`, of any floating dtype, and returns it.

    product: what multiplies the numbers that x and weight stand for, in float32.
    """
    numbers = dequantize_rows_ref(x.values, x.scales, weight.group_size)
    sums = numbers.new_empty(out.shape)
    product(numbers, weight.dequantized(), None if bias is None else bias.float(), sums)
    return out.copy_(sums)


def scaled_config(
    num_rows: int, out_features: int, in_features: int, *, group_size: int | None
) -> ScaledConfig:
    """By arithmetic, since no card was at hand: few rows are all about bytes in flight."""
    if num_rows > MAX_STREAMED_ROWS:
        block_k = tile_width(in_features, group_size, largest=128)
        return ScaledConfig(_TILE_ROWS, _TILE_N, block_k, 1, num_warps=8, num_stages=3)
    rows = max(16, triton.next_power_of_2(num_rows))
    block_k = tile_width(in_features, group_size, largest=256 if group_size is None else 128)
    num_programs, num_tiles = triton.cdiv(out_features, _STREAM_N), triton.cdiv(in_features, block_k)
    wanted = min(_WANTED_PROGRAMS // num_programs, num_tiles // _MIN_TILES_A_SPLIT, _MAX_SPLITS)
    splits = 1 << max(wanted, 1).bit_length() - 1
    return ScaledConfig(rows, _STREAM_N, block_k, splits, num_warps=4, num_stages=4)


def tile_width(in_features: int, group_size: int | None, *, largest: int) -> int:
    """Input features of a tile, a power of two that no group's end crosses: 32 at least, which is what the
    matrix units take at once, so groups are multiples of 32."""
    if group_size is None:
        return min(largest, max(32, triton.next_power_of_2(in_features)))
    assert group_size % 32 == 0
    return min(largest, group_size & -group_size)


def scaled_workspace_size(out_features: int, in_features: int, *, group_size: int | None) -> tuple[int, int]:
    """Numbers of 32 bits of partial sums, and of counters, that a layer needs at any number of rows."""
    partials = counters = 0
    for rows in (16, 32, MAX_STREAMED_ROWS):
        config = scaled_config(rows, out_features, in_features, group_size=group_size)
        if config.splits > 1:
            partials = max(partials, config.splits * config.rows * out_features)
            counters = max(counters, triton.cdiv(out_features, config.block_n))
    return partials, counters


@triton.jit
def _tile_products(values, weights):
    """values @ weights^T of a tile, in int32 or float32."""
    if values.dtype.is_int8():
        products = tl.dot(values, tl.trans(weights), out_dtype=tl.int32)
    elif _INTERPRETED:
        products = tl.dot(widen(values), tl.trans(widen(weights)), input_precision="ieee")
    elif values.shape[0] < _SMALLEST_FP8_ROWS:
        # Exact, and as fast where weights are waited for: matrix units take so few rows of 8-bit floats on
        # some cards only, and for others the compiler would do the same unasked.
        products = tl.dot(values.to(tl.float16), tl.trans(weights.to(tl.float16)))
    else:
        products = tl.dot(values, tl.trans(weights))
    return products


@triton.jit
def _add_tile(
    sums,
    values,
    weights,
    x_scales_at,
    weight_scales_at,
    tile,
    IN_FEATURES: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    products = _tile_products(values, weights)
    if GROUP > 0:
        # A split's last tiles may lie behind the last group; what is there is zero.
        group = tl.minimum(tile * BLOCK_K // GROUP, (IN_FEATURES + GROUP - 1) // GROUP - 1)
        factors = tl.load(x_scales_at + group)[:, None]
        products *= factors * tl.load(weight_scales_at + group * SCALE_STRIDE)[None, :]
    return sums + products


@triton.jit
def scaled_sums(
    x,
    x_scales,
    x_rows,
    weight,
    weight_scales,
    weight_rows,
    first_tile,
    IN_FEATURES: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    NUM_TILES: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    NUM_WEIGHT_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    STREAMS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Products of x's rows `x_rows` [ROWS] int64 with the weights' rows `weight_rows` [NUM_WEIGHT_ROWS] int64
    over NUM_TILES tiles from `first_tile`: [ROWS, NUM_WEIGHT_ROWS] float32, with the scales of groups. Those
    of whole rows (GROUP 0) are `scale_rows`'s; until then int8's sums are int32.

    SCALE_STRIDE: rows of the whole weight. STREAMS: the first tile of weights is loaded before the wait, and
    used last, which takes registers that large tiles don't have. Waits for the predecessor, and releases the
    successor, where PDL.
    """
    NUM_GROUPS: tl.constexpr = (IN_FEATURES + GROUP - 1) // GROUP if GROUP > 0 else 1
    columns = first_tile * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    values_at = x + x_rows[:, None] * IN_FEATURES + columns
    weights_at = weight + weight_rows[:, None] * IN_FEATURES + columns
    x_scales_at = x_scales + x_rows * NUM_GROUPS
    weight_scales_at = weight_scales + weight_rows
    if STREAMS:
        first_weights = load_tile(weights_at, columns, IN_FEATURES, IS_WHOLE, "")
    wait_for_predecessor(PDL)
    release_successor(PDL)
    is_int8: tl.constexpr = x.dtype.element_ty.is_int8()
    sums = tl.zeros((ROWS, NUM_WEIGHT_ROWS), tl.int32 if is_int8 else tl.float32)
    for tile in tl.range(1 if STREAMS else 0, NUM_TILES, num_stages=NUM_STAGES):
        shift = tile * BLOCK_K
        weights = load_tile(weights_at + shift, columns + shift, IN_FEATURES, IS_WHOLE, "")
        values = load_tile(values_at + shift, columns + shift, IN_FEATURES, IS_WHOLE, "")
        sums = _add_tile(
            sums,
            values,
            weights,
            x_scales_at,
            weight_scales_at,
            first_tile + tile,
            IN_FEATURES,
            GROUP,
            SCALE_STRIDE,
            BLOCK_K,
        )
    if STREAMS:
        values = load_tile(values_at, columns, IN_FEATURES, IS_WHOLE, "")
        sums = _add_tile(
            sums,
            values,
            first_weights,
            x_scales_at,
            weight_scales_at,
            first_tile,
            IN_FEATURES,
            GROUP,
            SCALE_STRIDE,
            BLOCK_K,
        )
    return sums


@triton.jit
def scale_rows(sums, x_scales, x_rows, weight_scales, weight_rows, GROUP: tl.constexpr):
    """The sums of `scaled_sums` in float32, with the scales of whole rows where those are the only ones."""
    if GROUP == 0:
        factors = tl.load(x_scales + x_rows)[:, None] * tl.load(weight_scales + weight_rows)[None, :]
        sums = sums.to(tl.float32) * factors
    return sums


@triton.jit(do_not_specialize=["num_rows"])
def _scaled_linear_kernel(
    x,  # [num_rows, IN_FEATURES]
    x_scales,  # [num_rows, num_groups] float32
    weight,  # [OUT_FEATURES, IN_FEATURES]
    weight_scales,  # [num_groups, OUT_FEATURES] float32
    bias,  # [OUT_FEATURES] where HAS_BIAS
    out,  # [num_rows, OUT_FEATURES]
    partials,  # [SPLITS, ROWS, OUT_FEATURES] of the sums' type, where SPLITS > 1
    counters,  # [programs of a split] int32
    num_rows,
    OUT_FEATURES: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    # Tiles of rows vary fastest: those that want the same weights follow each other.
    num_row_tiles = tl.cdiv(num_rows, ROWS)
    group_of_columns = tl.program_id(0) // num_row_tiles
    split = tl.program_id(1)
    NUM_TILES: tl.constexpr = (IN_FEATURES + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K)
    STREAMS: tl.constexpr = ROWS <= _MAX_STREAMED
    rows = (tl.program_id(0) % num_row_tiles) * ROWS + tl.arange(0, ROWS)
    features = group_of_columns * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns behind the last repeat it, and are not stored.
    x_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    columns = tl.minimum(features, OUT_FEATURES - 1)
    sums = scaled_sums(
        x,
        x_scales,
        x_rows,
        weight,
        weight_scales,
        columns.to(tl.int64),
        split * NUM_TILES,
        IN_FEATURES,
        GROUP,
        OUT_FEATURES,
        NUM_TILES,
        IN_FEATURES % (SPLITS * BLOCK_K) == 0,
        ROWS,
        BLOCK_N,
        BLOCK_K,
        NUM_STAGES,
        STREAMS,
        PDL,
    )
    offsets = (x_rows * OUT_FEATURES)[:, None] + columns[None, :]
    mask = (rows < num_rows)[:, None] & (features < OUT_FEATURES)[None, :]
    is_last = True
    if SPLITS > 1:
        PART_SIZE: tl.constexpr = ROWS * OUT_FEATURES
        tl.store(partials + split * PART_SIZE + offsets, sums, mask)
        # The counter is one thread's, the parts are all threads': first they must all have stored.
        tl.debug_barrier()
        num_before = tl.atomic_add(counters + group_of_columns, 1, sem="acq_rel", scope="gpu")
        is_last = num_before == SPLITS - 1
        if is_last:
            tl.store(counters + group_of_columns, 0)  # for the next launch
            sums = add_parts(partials, offsets, mask, PART_SIZE, SPLITS)
    if is_last:
        numbers = scale_rows(sums, x_scales, x_rows, weight_scales, columns, GROUP)
        if HAS_BIAS:
            numbers += widen(tl.load(bias + columns))[None, :]
        tl.store(out + offsets, numbers.to(out.dtype.element_ty), mask)


def scaled_linear(
    x: ScaledRows,
    weight: ScaledWeight,
    bias: Tensor | None,
    out: Tensor,
    *,
    workspace: LinearWorkspace,
    config: ScaledConfig | None = None,
) -> Tensor:
    """See `scaled_linear_ref`; all tensors are contiguous. x and weight are of one format, and int8 has no
    groups. workspace: at least of `scaled_workspace_size`; config: None for `scaled_config`'s.
    """
    if not runs_triton(x.values):
        return scaled_linear_ref(x, weight, bias, out)
    num_rows, (out_features, in_features) = len(x.values), weight.values.shape
    if num_rows == 0:
        return out
    group_size = weight.group_size
    config = config or scaled_config(num_rows, out_features, in_features, group_size=group_size)
    is_int8 = weight.values.dtype == torch.int8
    assert x.values.dtype == weight.values.dtype and not (is_int8 and group_size)
    assert x.values.shape[1] == in_features and out.shape == (num_rows, out_features)
    assert x.values.is_contiguous() and weight.values.is_contiguous() and out.is_contiguous()
    assert x.scales.is_contiguous() and weight.scales.is_contiguous()
    num_programs, partials = triton.cdiv(out_features, config.block_n), workspace.partials
    if config.splits > 1:
        assert num_rows <= config.rows
        assert partials.numel() >= config.splits * config.rows * out_features
        assert workspace.counters.numel() >= num_programs
    _scaled_linear_kernel[(num_programs * triton.cdiv(num_rows, config.rows), config.splits)](
        x.values,
        x.scales,
        weight.values,
        weight.scales,
        x.scales if bias is None else bias,
        out,
        partials.view(torch.int32) if is_int8 else partials,
        workspace.counters,
        num_rows,
        OUT_FEATURES=out_features,
        IN_FEATURES=in_features,
        GROUP=group_size or 0,
        HAS_BIAS=bias is not None,
        ROWS=config.rows,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLITS=config.splits,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(x.values.device),
    )
    return out
