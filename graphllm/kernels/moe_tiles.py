"""The tokens of each expert, cut into tiles that one product each computes.

A pair is a token and one of its experts: pair p is choice p % top_k of token p // top_k. The pairs of an
expert, in their order, fill tiles of `rows_per_tile`; the last one ends in -1. The tiles of expert 0 come
first. Padding pairs, whose expert is -1, are in no tile, so no weights are read for them.

Owns this order and the number of tiles. All is done on the device and without atomics: the same choices give
the same tiles, whatever the order in which programs run. How many tiles are in use is known to the device
only; there is room for as many as the sizes can ever need, and what is not used says -1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
)

MIN_ROWS_PER_TILE = 16
"""Rows of the smallest product that the matrix units do."""
MAX_ROWS_PER_TILE = 128

# Pairs that a program looks at in a turn: those of a decode step, all at once.
_CHUNK = 1024
_NUM_WARPS = 4


@dataclass(frozen=True, slots=True)
class ExpertTiles:
    """experts: [num_tiles] int32, whose tile it is, -1 where it is not in use. pairs: [num_tiles,
    rows_per_tile] int32, defined for the tiles in use: pair numbers, then -1."""

    experts: Tensor
    pairs: Tensor

    @property
    def num_tiles(self) -> int:
        return self.pairs.shape[0]

    @property
    def rows_per_tile(self) -> int:
        return self.pairs.shape[1]


@dataclass(frozen=True, slots=True)
class RoutedTokens:
    """Where a step's tokens go: experts, [num_tokens, top_k] int32, -1 for padding; weights, the same in
    float32; and the tiles that follow from them, None where products go from pair to pair."""

    experts: Tensor
    weights: Tensor
    tiles: ExpertTiles | None


def max_expert_tiles(num_pairs: int, num_experts: int, rows_per_tile: int) -> int:
    """Tiles that num_pairs pairs can need: each expert that has pairs may leave all but one row empty."""
    num_used = min(num_pairs, num_experts)
    return (num_pairs + num_used * (rows_per_tile - 1)) // rows_per_tile


def rows_per_tile_for(num_pairs: int, num_experts: int) -> int:
    """Rows of a tile: a power of two that an average expert's pairs fill, within the limits.

    Larger tiles read weights less often, smaller ones waste fewer rows on experts with few pairs.
    """
    average = max(num_pairs // num_experts, 1)
    return min(max(triton.next_power_of_2(average), MIN_ROWS_PER_TILE), MAX_ROWS_PER_TILE)


def expert_tiles_ref(experts: Tensor, *, num_experts: int, out: ExpertTiles) -> ExpertTiles:
    """experts: [num_tokens, top_k] int32, -1 for padding. Writes `out`, with as many tiles as
    `max_expert_tiles` says or more, and returns it."""
    out.experts.fill_(-1)
    out.pairs.fill_(-1)
    chosen, tile = experts.flatten(), 0
    for expert in range(num_experts):
        pairs = (chosen == expert).nonzero().flatten()
        for first in range(0, len(pairs), out.rows_per_tile):
            rows = pairs[first : first + out.rows_per_tile]
            out.experts[tile] = expert
            out.pairs[tile, : len(rows)] = rows
            tile += 1
    return out


@triton.jit
def _count_pairs(experts, num_pairs, NUM_EXPERTS: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr):
    """[PADDED] int32: pairs of each expert, 0 behind the last expert."""
    counts = tl.zeros((PADDED,), tl.int32)
    for first in range(0, num_pairs, CHUNK):
        pairs = first + tl.arange(0, CHUNK)
        chosen = tl.load(experts + pairs, mask=pairs < num_pairs, other=-1)
        # Padding is counted in a bin of its own, which PADDED > NUM_EXPERTS leaves room for.
        counts += tl.histogram(tl.where(chosen < 0, NUM_EXPERTS, chosen), PADDED)
    return tl.where(tl.arange(0, PADDED) < NUM_EXPERTS, counts, 0)


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def _expert_tiles_kernel(
    experts,  # [num_pairs] int32
    tile_experts,  # [num_tiles] int32
    tile_pairs,  # [num_tiles, ROWS] int32
    num_pairs,
    num_tiles,
    NUM_EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program for each expert, and one for the tiles that are not in use."""
    wait_for_predecessor(PDL)
    release_successor(PDL)
    expert = tl.program_id(0)
    counts = _count_pairs(experts, num_pairs, NUM_EXPERTS, PADDED, CHUNK)
    bins = tl.arange(0, PADDED)
    first_tile = tl.sum(tl.where(bins < expert, (counts + ROWS - 1) // ROWS, 0), 0)
    count = tl.sum(tl.where((bins == expert) & (bins < NUM_EXPERTS), counts, 0), 0)
    end_tile = first_tile + (count + ROWS - 1) // ROWS
    if expert == NUM_EXPERTS:
        end_tile = num_tiles
    owner = tl.where(expert == NUM_EXPERTS, -1, expert)
    for first in range(first_tile, end_tile, CHUNK):
        tiles = first + tl.arange(0, CHUNK)
        tl.store(tile_experts + tiles, tl.zeros((CHUNK,), tl.int32) + owner, mask=tiles < end_tile)
    if count > 0:
        own_pairs = tile_pairs + first_tile * ROWS
        empty = count + tl.arange(0, ROWS)
        is_in_tile = empty < (end_tile - first_tile) * ROWS
        tl.store(own_pairs + empty, tl.full((ROWS,), -1, tl.int32), mask=is_in_tile)
        num_placed = 0
        for first in range(0, num_pairs, CHUNK):
            pairs = first + tl.arange(0, CHUNK)
            is_own = tl.load(experts + pairs, mask=pairs < num_pairs, other=-1) == expert
            ranks = num_placed + tl.cumsum(is_own.to(tl.int32), 0) - 1
            tl.store(own_pairs + ranks, pairs, mask=is_own)
            num_placed += tl.sum(is_own.to(tl.int32), 0)


def expert_tiles(experts: Tensor, *, num_experts: int, out: ExpertTiles) -> ExpertTiles:
    """See `expert_tiles_ref`. The kernel needs all tensors contiguous."""
    if not runs_triton(experts):
        return expert_tiles_ref(experts, num_experts=num_experts, out=out)
    num_pairs = experts.numel()
    assert out.num_tiles >= max_expert_tiles(num_pairs, num_experts, out.rows_per_tile)
    assert experts.dtype == out.experts.dtype == out.pairs.dtype == torch.int32
    assert experts.is_contiguous() and out.experts.is_contiguous() and out.pairs.is_contiguous()
    _expert_tiles_kernel[(num_experts + 1,)](
        experts,
        out.experts,
        out.pairs,
        num_pairs,
        out.num_tiles,
        NUM_EXPERTS=num_experts,
        PADDED=triton.next_power_of_2(num_experts + 1),
        ROWS=out.rows_per_tile,
        CHUNK=_CHUNK,
        num_warps=_NUM_WARPS,
        **launch_options(experts.device),
    )
    return out
