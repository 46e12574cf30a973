"""The product of a linear layer with few rows, which is all about streaming the weights from memory.

    y_{t,n} = sum_k x_{t,k} * weight_{n,k} + bias_n,  t < 16, in float32 sums

A program takes `block_n` rows of weights and runs along them in tiles of `block_k`. The "gemv" form keeps
the products on CUDA cores: all threads lie along k, so that weights arrive in 128-bit loads and every value
of x is used for `block_n` rows. The "dot" form pads the rows to 16 for the matrix units.

Weights do not depend on the kernel before this one. With programmatic dependent launch the first tile is
loaded before the wait, and it is used last, so that its way from memory and those of the tiles behind it
overlap. GRAPHLLM_WEIGHT_PREFETCH=1 lets a program that waits ask for the rest of its weights as well, as far
as into L2: it is meant for a predecessor that is long and leaves the memory idle, as attention over a short
context does. Where `out_features` alone does not fill a card, `splits` programs share a sum: each stores its
part, and the one that arrives last adds the parts in their order, so that the result does not depend on
the order of arrival.

Owns the loop over weights, which `gated_linear` shares. Which product takes this kernel, and in which
configuration, is measured: see `linear_choice.py`.
"""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.linear_choice import SkinnyConfig
from graphllm.kernels.triton_support import (
    dot,
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
    widen,
)

PREFETCH_VARIABLE = "GRAPHLLM_WEIGHT_PREFETCH"
"""Environment variable: "1" switches the prefetch of weights into L2 on, which is off until measured."""

_CACHE_LINE_BITS: tl.constexpr = tl.constexpr(1024)
# Products that a thread adds up before they join the running sums: a 128-bit load of 16-bit weights.
_ADJACENT: tl.constexpr = tl.constexpr(8)


def skinny_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """x: [num_rows, in_features], weight: [out_features, in_features], bias: [out_features] or None.

    Writes [num_rows, out_features] into `out`, of x's dtype or float32, and returns it. Sums, and the
    addition of the bias, are in float32.
    """
    products = torch.mm(x.float(), weight.float().t())
    return out.copy_(products if bias is None else products + bias.float())


def skinny_scratch_bytes(num_rows: int, out_features: int, config: SkinnyConfig) -> int:
    """Bytes that `partials` of `skinny_linear` must have, at any number of rows up to num_rows."""
    if config.splits == 1:
        return 0
    return 4 * config.splits * config.rows_held(num_rows) * out_features


def skinny_num_counters(out_features: int, config: SkinnyConfig) -> int:
    """Integers that `counters` of `skinny_linear` must have."""
    return 0 if config.splits == 1 else triton.cdiv(out_features, config.block_n)


@functools.cache
def prefetches_weights() -> bool:
    """Whether programs that wait for their predecessor prefetch; without dependent launch none waits."""
    return os.environ.get(PREFETCH_VARIABLE) == "1"


@triton.jit
def _prefetch_weights(
    weight,
    weight_rows,
    first_column,
    IN_FEATURES: tl.constexpr,
    NUM_TILES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Ask for the lines of all tiles but the first, which is loaded, and wait for none."""
    LINE: tl.constexpr = _CACHE_LINE_BITS // weight.dtype.element_ty.primitive_bitwidth
    for tile in range(1, NUM_TILES):
        columns = first_column + tile * BLOCK_K + tl.arange(0, BLOCK_K // LINE) * LINE
        columns = tl.minimum(columns, IN_FEATURES - 1)
        lines = weight + weight_rows[:, None] * IN_FEATURES + columns[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [lines.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def load_tile(pointers, columns, IN_FEATURES: tl.constexpr, IS_WHOLE: tl.constexpr, POLICY: tl.constexpr):
    """A tile whose last dimension are input features `columns`; zeros behind the last feature."""
    if IS_WHOLE:
        tile = tl.load(pointers, eviction_policy=POLICY)
    else:
        tile = tl.load(pointers, columns < IN_FEATURES, other=0.0, eviction_policy=POLICY)
    return tile


@triton.jit
def multiply_on_cores(x, weight, sums, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """sums [ROWS, BLOCK_N, BLOCK_K / 8] + x [ROWS, 1, BLOCK_K] * weight [1, BLOCK_N, BLOCK_K], each eight
    neighbours in one: they are of one thread, which needs no other to add them."""
    products = tl.reshape(widen(weight) * widen(x), (ROWS, BLOCK_N, BLOCK_K // _ADJACENT, _ADJACENT))
    return sums + tl.sum(products, 3)


@triton.jit
def stream_weights(
    x,
    weight,
    weight_rows,
    num_rows,
    first_column,
    IN_FEATURES: tl.constexpr,
    NUM_TILES: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    NUM_WEIGHT_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USES_DOT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PREFETCHES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Products of x's rows with the weights' rows `weight_rows` [NUM_WEIGHT_ROWS] int64, over NUM_TILES
    tiles of BLOCK_K input features from `first_column`: [ROWS, NUM_WEIGHT_ROWS] float32.

    Waits for the predecessor, and releases the successor. Rows from num_rows on repeat the last.
    """
    rows = tl.minimum(tl.arange(0, ROWS), num_rows - 1)
    if USES_DOT:
        columns = first_column + tl.arange(0, BLOCK_K)[None, :]
        x_tile = x + rows[:, None] * IN_FEATURES + columns
        weight_tile = weight + weight_rows[:, None] * IN_FEATURES + columns
    else:
        columns = first_column + tl.arange(0, BLOCK_K)[None, None, :]
        x_tile = x + rows[:, None, None] * IN_FEATURES + columns
        weight_tile = weight + weight_rows[None, :, None] * IN_FEATURES + columns
    first_weights = load_tile(weight_tile, columns, IN_FEATURES, IS_WHOLE, "evict_first")
    if PREFETCHES and PDL:
        _prefetch_weights(weight, weight_rows, first_column, IN_FEATURES, NUM_TILES, BLOCK_K)
    wait_for_predecessor(PDL)
    release_successor(PDL)
    if USES_DOT:
        sums = tl.zeros((ROWS, NUM_WEIGHT_ROWS), tl.float32)
    else:
        sums = tl.zeros((ROWS, NUM_WEIGHT_ROWS, BLOCK_K // _ADJACENT), tl.float32)
    for tile in tl.range(1, NUM_TILES, num_stages=NUM_STAGES):
        shift = tile * BLOCK_K
        weights = load_tile(weight_tile + shift, columns + shift, IN_FEATURES, IS_WHOLE, "evict_first")
        values = load_tile(x_tile + shift, columns + shift, IN_FEATURES, IS_WHOLE, "")
        if USES_DOT:
            sums = dot(values, tl.trans(weights), sums)
        else:
            sums = multiply_on_cores(values, weights, sums, ROWS, NUM_WEIGHT_ROWS, BLOCK_K)
    values = load_tile(x_tile, columns, IN_FEATURES, IS_WHOLE, "")
    if USES_DOT:
        sums = dot(values, tl.trans(first_weights), sums)
    else:
        sums = tl.sum(multiply_on_cores(values, first_weights, sums, ROWS, NUM_WEIGHT_ROWS, BLOCK_K), 2)
    return sums


@triton.jit
def add_parts(partials, offsets, mask, PART_SIZE: tl.constexpr, SPLITS: tl.constexpr):
    """The sum of all programs' parts, always in the same order. L1 may hold what stood there before."""
    sums = tl.load(partials + offsets, mask, other=0.0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        sums += tl.load(partials + split * PART_SIZE + offsets, mask, other=0.0, cache_modifier=".cg")
    return sums


@triton.jit
def store_rows(out, bias, sums, offsets, columns, mask, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        sums += widen(tl.load(bias + columns))[None, :]
    tl.store(out + offsets, sums.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["num_rows"])
def _skinny_linear_kernel(
    x,
    weight,
    bias,
    out,
    partials,
    counters,
    num_rows,
    OUT_FEATURES: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    USES_DOT: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PREFETCHES: tl.constexpr,
    PDL: tl.constexpr,
):
    group = tl.program_id(0)
    split = tl.program_id(1)
    NUM_TILES: tl.constexpr = (IN_FEATURES + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K)
    features = group * BLOCK_N + tl.arange(0, BLOCK_N)
    # A last program that is not full repeats the last row of weights, and stores it once.
    columns = tl.minimum(features, OUT_FEATURES - 1)
    sums = stream_weights(
        x,
        weight,
        columns.to(tl.int64),
        num_rows,
        split * (NUM_TILES * BLOCK_K),
        IN_FEATURES,
        NUM_TILES,
        IN_FEATURES % (SPLITS * BLOCK_K) == 0,
        ROWS,
        BLOCK_N,
        BLOCK_K,
        USES_DOT,
        NUM_STAGES,
        PREFETCHES,
        PDL,
    )
    rows = tl.arange(0, ROWS)[:, None]
    offsets = rows * OUT_FEATURES + columns[None, :]
    mask = (rows < num_rows) & (features[None, :] < OUT_FEATURES)
    if SPLITS == 1:
        store_rows(out, bias, sums, offsets, columns, mask, HAS_BIAS)
    else:
        PART_SIZE: tl.constexpr = ROWS * OUT_FEATURES
        tl.store(partials + split * PART_SIZE + offsets, sums, mask)
        # The counter is one thread's, the parts are all threads': first they must all have stored.
        tl.debug_barrier()
        num_before = tl.atomic_add(counters + group, 1, sem="acq_rel", scope="gpu")
        if num_before == SPLITS - 1:
            tl.store(counters + group, 0)  # for the next launch
            sums = add_parts(partials, offsets, mask, PART_SIZE, SPLITS)
            store_rows(out, bias, sums, offsets, columns, mask, HAS_BIAS)


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    config: SkinnyConfig,
    partials: Tensor,
    counters: Tensor,
) -> Tensor:
    """See `skinny_linear_ref`; x, weight and out are contiguous, num_rows is at most config.max_rows.

    partials: `skinny_scratch_bytes` of float32, any values. counters: `skinny_num_counters` int32, zeros at
    the first launch; every launch leaves zeros. Both may serve all products that run one after the other.
    """
    if not runs_triton(x):
        return skinny_linear_ref(x, weight, bias, out)
    num_rows, (out_features, in_features) = x.shape[0], weight.shape
    if num_rows == 0:
        return out
    assert num_rows <= config.max_rows and x.is_contiguous() and weight.is_contiguous()
    num_groups = triton.cdiv(out_features, config.block_n)
    if config.splits > 1:
        assert partials.nbytes >= skinny_scratch_bytes(num_rows, out_features, config)
        assert counters.numel() >= num_groups
    _skinny_linear_kernel[(num_groups, config.splits)](
        x,
        weight,
        x if bias is None else bias,
        out,
        partials,
        counters,
        num_rows,
        OUT_FEATURES=out_features,
        IN_FEATURES=in_features,
        HAS_BIAS=bias is not None,
        ROWS=config.rows_held(num_rows),
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLITS=config.splits,
        USES_DOT=config.form == "dot",
        NUM_STAGES=config.num_stages,
        PREFETCHES=prefetches_weights(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(x.device),
    )
    return out
