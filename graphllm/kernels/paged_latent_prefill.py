"""Rows with several queries over a paged cache of latents, in a batch of any mixture of rows.

The mathematics is that of paged_latent_attention.py; the step's own latents are in the cache already. Heads
and queries alike are rows of a tile, since all of them read the same latents: an item of the prefill work
list (attention_work_list.py) has as many queries as a tile has room for with all their heads, and where one
query's heads are more than a tile holds, the item is that query and several tiles. Latents before the item's
first query are seen by all of its queries and need no mask.

A fixed number of programs takes the (item, tile of heads) pairs, the longest first, forth in one round and
back in the next, which keeps their sums alike without a counter, and the launch the same for any batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.attention_tiles import NO_MAXIMUM, cache_rows, capability_of, padded_side
from graphllm.kernels.attention_work_list import ITEM_FIELDS, PrefillWorkList
from graphllm.kernels.latent_tiles import attend_latents, load_part
from graphllm.kernels.paged_latent_attention import paged_latent_attention_ref
from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
)

_NO_MAXIMUM: tl.constexpr = tl.constexpr(NO_MAXIMUM)
# Major compute capabilities with 228 KiB a multiprocessor.
_LARGE_SHARED_MEMORY = (9, 10)


@dataclass(frozen=True, slots=True)
class LatentPrefillConfig:
    """How the kernel is compiled. rows: of a tile, each a query and a head; tile: latents a step."""

    rows: int
    tile: int
    num_warps: int
    num_stages: int

    def queries_per_item(self, num_heads: int) -> int:
        """How many queries a tile holds with all their heads: the work list's query_tile."""
        return max(1, self.rows // num_heads)


def latent_prefill_config(
    query_itemsize: int, cache_itemsize: int, *, capability: tuple[int, int] = (9, 0)
) -> LatentPrefillConfig:
    """The largest tiles that need no spills. `rows`, which the work list depends on, is the same on all."""
    if query_itemsize > 2:  # float32 has no matrix units here, so registers are what is scarce
        return LatentPrefillConfig(16, 16, num_warps=4, num_stages=1)
    if cache_itemsize == 1:  # the conversion takes the registers of half the latents
        return LatentPrefillConfig(32, 16, num_warps=8, num_stages=3)
    # As in decoding: of five stages two are tiles in flight, and of three one.
    num_stages = 5 if capability[0] in _LARGE_SHARED_MEMORY else 3
    return LatentPrefillConfig(32, 32, num_warps=8, num_stages=num_stages)


def paged_latent_prefill_ref(
    query: Tensor,
    cache: Tensor,
    *,
    block_tables: Tensor,
    work: PrefillWorkList,
    scale: float,
    cache_scale: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """Each item as a row of its own; arguments as in `paged_latent_prefill`."""
    for token, num_queries, position, slot, _ in work.items[: int(work.num_items)].tolist():
        tokens = slice(token, token + num_queries)
        out[tokens] = paged_latent_attention_ref(
            query[tokens],
            cache,
            block_tables=block_tables,
            row_slots=torch.tensor([slot]),
            query_lens=torch.tensor([num_queries]),
            context_lens=torch.tensor([position + num_queries]),
            scale=scale,
            rank=out.shape[2],
            cache_scale=cache_scale,
        )
    return out


@triton.jit
def _attend_range(
    query_latent,
    query_turned,
    accumulator,
    total,
    maximum,
    cache,
    cache_scale,
    table,
    query_positions,
    begin,
    end,
    SCALE: tl.constexpr,
    RANK: tl.constexpr,
    TURNED: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    TURNED_PADDED: tl.constexpr,
    IS_SCALED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """The tiles from `begin` to `end`. Without a mask they must be whole, and seen by all queries."""
    for start in range(begin, end, TILE):
        positions = start + tl.arange(0, TILE)
        is_inside = tl.full([TILE], True, tl.int1)
        if IS_MASKED:
            is_inside = positions < end
        accumulator, total, maximum = attend_latents(
            query_latent,
            query_turned,
            accumulator,
            total,
            maximum,
            cache,
            cache_scale,
            cache_rows(table, positions, is_inside, BLOCK_SIZE),
            is_inside,
            positions[None, :] <= query_positions[:, None],
            SCALE,
            RANK,
            TURNED,
            RANK_PADDED,
            TURNED_PADDED,
            IS_SCALED,
            IS_MASKED,
        )
    return accumulator, total, maximum


@triton.jit(do_not_specialize=["table_stride"])
def _paged_latent_prefill_kernel(
    query,
    cache,
    cache_scale,
    block_tables,
    items,
    num_items,
    out,
    table_stride,
    SCALE: tl.constexpr,
    IS_SCALED: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    RANK: tl.constexpr,
    TURNED: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    TURNED_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ITEM_FIELDS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    release_successor(PDL)
    HEADS: tl.constexpr = NUM_HEADS if NUM_HEADS < ROWS else ROWS  # of a query in a tile
    HEAD_TILES: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    tile_rows = tl.arange(0, ROWS)
    index = tile_rows // HEADS
    dims = tl.arange(0, RANK_PADDED)
    num_pairs = tl.load(num_items) * HEAD_TILES
    for turn in range(0, tl.cdiv(num_pairs, num_programs)):
        pair = turn * num_programs + tl.where(turn % 2 == 0, program, num_programs - 1 - program)
        if pair < num_pairs:
            record = items + pair // HEAD_TILES * ITEM_FIELDS
            token = tl.load(record).to(tl.int64)
            num_queries = tl.load(record + 1)
            first_position = tl.load(record + 2)
            slot = tl.load(record + 3)
            heads = pair % HEAD_TILES * HEADS + tile_rows % HEADS
            is_row = (index < num_queries) & (heads < NUM_HEADS)
            places = (token + index) * NUM_HEADS + heads
            of_rows = query + places * (RANK + TURNED)
            query_latent = load_part(of_rows, is_row, RANK, RANK_PADDED)
            query_turned = load_part(of_rows + RANK, is_row, TURNED, TURNED_PADDED)
            query_positions = first_position + tl.minimum(index, num_queries - 1)
            table = block_tables + slot.to(tl.int64) * table_stride
            accumulator = tl.zeros([ROWS, RANK_PADDED], dtype=tl.float32)
            total = tl.zeros([ROWS], dtype=tl.float32)
            maximum = tl.full([ROWS], _NO_MAXIMUM, dtype=tl.float32)
            masked = (first_position + 1) // TILE * TILE
            accumulator, total, maximum = _attend_range(
                query_latent,
                query_turned,
                accumulator,
                total,
                maximum,
                cache,
                cache_scale,
                table,
                query_positions,
                0,
                masked,
                SCALE,
                RANK,
                TURNED,
                RANK_PADDED,
                TURNED_PADDED,
                IS_SCALED,
                BLOCK_SIZE,
                TILE,
                False,
            )
            accumulator, total, maximum = _attend_range(
                query_latent,
                query_turned,
                accumulator,
                total,
                maximum,
                cache,
                cache_scale,
                table,
                query_positions,
                masked,
                first_position + num_queries,
                SCALE,
                RANK,
                TURNED,
                RANK_PADDED,
                TURNED_PADDED,
                IS_SCALED,
                BLOCK_SIZE,
                TILE,
                True,
            )
            attended = (accumulator / total[:, None]).to(out.dtype.element_ty)
            is_element = is_row[:, None] & (dims < RANK)[None, :]
            tl.store(out + (places * RANK)[:, None] + dims[None, :], attended, mask=is_element)


def paged_latent_prefill(
    query: Tensor,
    cache: Tensor,
    *,
    block_tables: Tensor,
    work: PrefillWorkList,
    scale: float,
    num_multiprocessors: int,
    cache_scale: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """Attend the prefill rows of `work` into `out`; other rows of `out` are left as they are.

    query: [num_tokens, num_heads, width], contiguous; cache: [num_blocks, block_size, width], contiguous;
    block_tables: [num_slots, max_blocks] int32; work: with `queries_per_item` of this shape's
    `latent_prefill_config`; scale: positive; cache_scale: [num_blocks, block_size] float32 for a cache in 8
    bits; out: [num_tokens, num_heads, rank], contiguous.
    """
    if not runs_triton(query):
        return paged_latent_prefill_ref(
            query,
            cache,
            block_tables=block_tables,
            work=work,
            scale=scale,
            cache_scale=cache_scale,
            out=out,
        )
    (_, num_heads, width), rank = query.shape, out.shape[2]
    assert scale > 0 and query.is_contiguous() and cache.is_contiguous() and out.is_contiguous()
    assert cache.shape[2] == width > rank and block_tables.stride(1) == 1
    config = latent_prefill_config(
        query.element_size(), cache.element_size(), capability=capability_of(query.device)
    )
    assert work.query_tile == config.queries_per_item(num_heads)
    # No more programs than the work can need: a small bucket launches a small grid.
    num_programs = min(num_multiprocessors, len(work.items) * triton.cdiv(num_heads, config.rows))
    _paged_latent_prefill_kernel[(num_programs,)](
        query,
        cache,
        cache_scale,
        block_tables,
        work.items,
        work.num_items,
        out,
        block_tables.stride(0),
        SCALE=scale,
        IS_SCALED=cache_scale is not None,
        NUM_HEADS=num_heads,
        RANK=rank,
        TURNED=width - rank,
        RANK_PADDED=padded_side(rank),
        TURNED_PADDED=padded_side(width - rank),
        ROWS=config.rows,
        BLOCK_SIZE=cache.shape[1],
        TILE=config.tile,
        ITEM_FIELDS=ITEM_FIELDS,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(query.device),
    )
    return out
