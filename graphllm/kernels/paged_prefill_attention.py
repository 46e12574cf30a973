"""Attention of rows with several queries over a paged cache, in a batch of any mixture of rows.

The mathematics is that of paged_attention.py; the step's own keys and values are in the cache already. For
each item of a prefill work list (see attention_work_list.py: consecutive queries of one row, at positions
p to p + n - 1) and each KV head, the query heads of that KV head and the item's queries fill the rows of one
tile, query by query: so a short chunk still fills it, keys and values are read once for the group, and
little of the causal triangle's edge is wasted. Key tiles between the window's left edge and p are seen by all
queries of the item and need no mask; tiles that nobody sees are not visited. Without causality all tiles of
the row are seen, or those between the window's edges on both sides.

A fixed number of programs takes the (item, KV head) pairs, the longest first, forth in one round and back
in the next, which keeps their sums alike without a counter, and the launch the same for any batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.attention_tiles import (
    LOG2_E,
    NO_MAXIMUM,
    attend_tile,
    cache_rows,
    capability_of,
    padded_side,
)
from graphllm.kernels.attention_work_list import ITEM_FIELDS, PrefillWorkList
from graphllm.kernels.paged_attention import paged_attention_ref
from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
)

_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)
_NO_MAXIMUM: tl.constexpr = tl.constexpr(NO_MAXIMUM)


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """How the prefill kernel is compiled and spread.

    query_rows: rows of a query tile, each a query and a head; key_tile: keys a step.
    """

    query_rows: int
    key_tile: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int


def prefill_config(
    head_dim: int,
    query_itemsize: int,
    cache_itemsize: int,
    *,
    capability: tuple[int, int] = (9, 0),
    has_window: bool = False,
    has_slopes: bool = False,
) -> PrefillConfig:
    """The largest tiles that need no spills, and with them the programs that a multiprocessor holds.

    What follows behind the sizes decides nothing about query_rows, which the work list depends on.
    """
    dims = padded_side(head_dim)
    if query_itemsize > 2:  # float32 has no matrix units here, so registers are what is scarce
        return PrefillConfig(32, 32, num_warps=4, num_stages=1, programs_per_multiprocessor=2)
    if dims > 128:
        return PrefillConfig(64, 32, num_warps=8, num_stages=3, programs_per_multiprocessor=1)
    if dims > 64:
        key_tile = 64 if capability[0] >= 9 else 32  # before 9.0 products keep their operands in registers
        return PrefillConfig(128, key_tile, num_warps=8, num_stages=3, programs_per_multiprocessor=1)
    # Masks of a window, and distances, take the registers of half the keys.
    if capability[0] == 10 and not (has_window or has_slopes):
        return PrefillConfig(128, 128, num_warps=8, num_stages=3, programs_per_multiprocessor=1)
    if cache_itemsize < 2 or has_slopes:  # the conversion takes registers
        return PrefillConfig(128, 64, num_warps=8, num_stages=3, programs_per_multiprocessor=1)
    if capability[0] in (9, 10):
        return PrefillConfig(128, 64, num_warps=8, num_stages=3, programs_per_multiprocessor=2)
    return PrefillConfig(128, 64, num_warps=4, num_stages=3, programs_per_multiprocessor=2)


def queries_per_item(num_heads: int, num_kv_heads: int, config: PrefillConfig) -> int:
    """How many queries of a row a tile holds, with all heads of a KV head: the work list's query_tile."""
    group = num_heads // num_kv_heads
    assert group <= config.query_rows, f"{group} query heads a KV head are more than a tile has rows"
    return config.query_rows // group


def paged_prefill_attention_ref(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    block_tables: Tensor,
    work: PrefillWorkList,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool = True,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """Each item as a row of its own, or without causality each row; arguments as below."""
    for token, num_queries, position, slot, context_len in work.items[: int(work.num_items)].tolist():
        if not is_causal:
            token, num_queries, position = token - position, context_len, 0
        tokens = slice(token, token + num_queries)
        out[tokens] = paged_attention_ref(
            query[tokens],
            key_cache,
            value_cache,
            block_tables=block_tables,
            row_slots=torch.tensor([slot]),
            query_lens=torch.tensor([num_queries]),
            context_lens=torch.tensor([position + num_queries]),
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            is_causal=is_causal,
            sinks=sinks,
            slopes=slopes,
            key_scale=key_scale,
            value_scale=value_scale,
        ).to(out.dtype)
    return out


@triton.jit
def _attend_range(
    queries,
    accumulator,
    total,
    maximum,
    key_cache,
    value_cache,
    key_scale,
    value_scale,
    table,
    query_positions,
    begin,
    end,
    length,
    kv_head,
    slopes,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    IS_SCALED: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """The key tiles from `begin` to `end`. Without a mask all their keys must be seen by all queries."""
    for start in range(begin, end, KEY_TILE):
        positions = start + tl.arange(0, KEY_TILE)
        is_inside = tl.full([KEY_TILE], True, tl.int1)
        if IS_MASKED:
            is_inside = positions < length
        is_visible = positions[None, :] <= query_positions[:, None]
        if not IS_CAUSAL:
            is_visible = is_inside[None, :] & (query_positions >= 0)[:, None]
            if WINDOW > 0:
                is_visible = is_visible & (positions[None, :] < query_positions[:, None] + WINDOW)
        if WINDOW > 0:
            is_visible = is_visible & (positions[None, :] > query_positions[:, None] - WINDOW)
        accumulator, total, maximum = attend_tile(
            queries,
            accumulator,
            total,
            maximum,
            key_cache,
            value_cache,
            key_scale,
            value_scale,
            cache_rows(table, positions, is_inside, BLOCK_SIZE),
            positions,
            is_inside,
            is_visible,
            kv_head,
            slopes,
            SCALE,
            SOFTCAP,
            NUM_KV_HEADS,
            HEAD_DIM,
            DIMS,
            HAS_SLOPES,
            IS_SCALED,
            IS_MASKED,
        )
    return accumulator, total, maximum


@triton.jit(do_not_specialize=["table_stride"])
def _paged_prefill_attention_kernel(
    query,
    key_cache,
    value_cache,
    key_scale,
    value_scale,
    block_tables,
    items,
    num_items,
    sinks,
    slopes,
    out,
    table_stride,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    IS_SCALED: tl.constexpr,
    QUERY_STRIDE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERY_ROWS: tl.constexpr,
    KEY_TILE: tl.constexpr,
    ITEM_FIELDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """WINDOW 0 means none."""
    wait_for_predecessor(PDL)
    release_successor(PDL)
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    query_rows = tl.arange(0, QUERY_ROWS)
    dims = tl.arange(0, DIMS)
    num_pairs = tl.load(num_items) * NUM_KV_HEADS
    for turn in range(0, tl.cdiv(num_pairs, num_programs)):
        pair = turn * num_programs + tl.where(turn % 2 == 0, program, num_programs - 1 - program)
        if pair < num_pairs:
            kv_head = pair % NUM_KV_HEADS
            record = items + pair // NUM_KV_HEADS * ITEM_FIELDS
            token = tl.load(record).to(tl.int64)
            num_queries = tl.load(record + 1)
            first_position = tl.load(record + 2)
            slot = tl.load(record + 3)
            index = query_rows // GROUP
            heads = kv_head * GROUP + query_rows % GROUP
            is_element = (index < num_queries)[:, None] & (dims < HEAD_DIM)[None, :]
            from_query = (token + index) * QUERY_STRIDE + heads * HEAD_DIM
            queries = tl.load(query + from_query[:, None] + dims[None, :], mask=is_element, other=0.0)
            query_positions = first_position + tl.minimum(index, num_queries - 1)
            table = block_tables + slot.to(tl.int64) * table_stride
            accumulator = tl.zeros([QUERY_ROWS, DIMS], dtype=tl.float32)
            total = tl.zeros([QUERY_ROWS], dtype=tl.float32)
            maximum = tl.full([QUERY_ROWS], _NO_MAXIMUM, dtype=tl.float32)

            row_slopes = heads  # anything, where there are none
            if HAS_SLOPES:
                row_slopes = tl.load(slopes + heads)
            length = first_position + num_queries
            begin = 0
            unmasked = 0
            if WINDOW > 0 and IS_CAUSAL:
                # The first key that the first query sees, and the first tile that the last query sees whole.
                begin = tl.maximum(first_position + 1 - WINDOW, 0)
                unmasked = begin + tl.cdiv(tl.maximum(length - WINDOW - begin, 0), KEY_TILE) * KEY_TILE
                unmasked = tl.minimum(unmasked, length)
                accumulator, total, maximum = _attend_range(
                    queries,
                    accumulator,
                    total,
                    maximum,
                    key_cache,
                    value_cache,
                    key_scale,
                    value_scale,
                    table,
                    query_positions,
                    begin,
                    unmasked,
                    length,
                    kv_head,
                    row_slopes,
                    SCALE,
                    SOFTCAP,
                    WINDOW,
                    IS_CAUSAL,
                    HAS_SLOPES,
                    IS_SCALED,
                    NUM_KV_HEADS,
                    HEAD_DIM,
                    DIMS,
                    BLOCK_SIZE,
                    KEY_TILE,
                    True,
                )
            masked = begin + (first_position + 1 - begin) // KEY_TILE * KEY_TILE
            if not IS_CAUSAL:
                last_seen = length + WINDOW - 1
                length = tl.load(record + 4)
                masked = length // KEY_TILE * KEY_TILE
                if WINDOW > 0:
                    unmasked = tl.maximum(first_position + 1 - WINDOW, 0)
                    masked = unmasked
                    length = tl.minimum(length, last_seen)
            masked = tl.maximum(masked, unmasked)
            accumulator, total, maximum = _attend_range(
                queries,
                accumulator,
                total,
                maximum,
                key_cache,
                value_cache,
                key_scale,
                value_scale,
                table,
                query_positions,
                unmasked,
                masked,
                length,
                kv_head,
                row_slopes,
                SCALE,
                SOFTCAP,
                WINDOW,
                IS_CAUSAL,
                HAS_SLOPES,
                IS_SCALED,
                NUM_KV_HEADS,
                HEAD_DIM,
                DIMS,
                BLOCK_SIZE,
                KEY_TILE,
                False,
            )
            accumulator, total, maximum = _attend_range(
                queries,
                accumulator,
                total,
                maximum,
                key_cache,
                value_cache,
                key_scale,
                value_scale,
                table,
                query_positions,
                masked,
                length,
                length,
                kv_head,
                row_slopes,
                SCALE,
                SOFTCAP,
                WINDOW,
                IS_CAUSAL,
                HAS_SLOPES,
                IS_SCALED,
                NUM_KV_HEADS,
                HEAD_DIM,
                DIMS,
                BLOCK_SIZE,
                KEY_TILE,
                True,
            )
            if HAS_SINKS:
                total += tl.exp2(tl.load(sinks + heads) * _LOG2_E - maximum)
            to = (token + index) * (NUM_HEADS * HEAD_DIM) + heads * HEAD_DIM
            attended = (accumulator / total[:, None]).to(out.dtype.element_ty)
            tl.store(out + to[:, None] + dims[None, :], attended, mask=is_element)


def paged_prefill_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    block_tables: Tensor,
    work: PrefillWorkList,
    scale: float,
    num_multiprocessors: int,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool = True,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """Attend the prefill rows of `work` into `out`; other rows of `out` are left as they are.

    query: [num_tokens, num_heads, head_dim], heads and their dimensions contiguous, num_heads a multiple of
    num_kv_heads; caches: [num_blocks, block_size, num_kv_heads, head_dim], contiguous; block_tables:
    [num_slots, max_blocks] int32; work: with `queries_per_item` of this shape's `prefill_config`; scale:
    positive; is_causal: False for rows that are whole prompts and see all of themselves, without slopes;
    sinks, slopes: [num_heads] float32, not both; key_scale, value_scale: [num_blocks, block_size,
    num_kv_heads] float32 for caches in 8 bits; out: [num_tokens, num_heads, head_dim], contiguous.
    """
    if not runs_triton(query):
        return paged_prefill_attention_ref(
            query,
            key_cache,
            value_cache,
            block_tables=block_tables,
            work=work,
            scale=scale,
            sliding_window=sliding_window,
            softcap=softcap,
            is_causal=is_causal,
            sinks=sinks,
            slopes=slopes,
            key_scale=key_scale,
            value_scale=value_scale,
            out=out,
        )
    _, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    config = prefill_config(
        head_dim,
        query.element_size(),
        key_cache.element_size(),
        capability=capability_of(query.device),
        has_window=sliding_window is not None,
        has_slopes=slopes is not None,
    )
    assert (
        scale > 0
        and (sinks is None or slopes is None)
        and (is_causal or slopes is None)
        and query.stride()[1:] == (head_dim, 1)
        and out.is_contiguous()
        and block_tables.stride(1) == 1
    )
    assert work.query_tile == queries_per_item(num_heads, num_kv_heads, config)
    # No more programs than the work can need: a small bucket launches a small grid.
    num_programs = min(
        config.programs_per_multiprocessor * num_multiprocessors, len(work.items) * num_kv_heads
    )
    _paged_prefill_attention_kernel[(num_programs,)](
        query,
        key_cache,
        value_cache,
        key_scale,
        value_scale,
        block_tables,
        work.items,
        work.num_items,
        sinks,
        slopes,
        out,
        block_tables.stride(0),
        SCALE=scale,
        SOFTCAP=softcap or 0.0,
        WINDOW=sliding_window or 0,
        IS_CAUSAL=is_causal,
        HAS_SINKS=sinks is not None,
        HAS_SLOPES=slopes is not None,
        IS_SCALED=key_scale is not None,
        QUERY_STRIDE=query.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        DIMS=padded_side(head_dim),
        BLOCK_SIZE=block_size,
        QUERY_ROWS=config.query_rows,
        KEY_TILE=config.key_tile,
        ITEM_FIELDS=ITEM_FIELDS,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(query.device),
    )
    return out
