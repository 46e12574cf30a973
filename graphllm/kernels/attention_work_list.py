"""How a step's attention is shared out among programs, decided on the device from the rows' lengths.

Decode rows (query_len 1). A row's visible tokens, first = max(0, context_len - window) to context_len, are
cut into granules of 64. All rows' granules stand in one line, N in all, and program p takes the next
n = max(1, ceil(N / num_programs)) of them, p n to (p + 1) n, whatever rows those belong to. So programs
never differ by more than n granules, a batch of one fills the card, and ragged rows cost what their bytes
cost. The list knows no heads: every KV head has its own num_programs programs, all with the same shares.

A piece is what one program has of one row. A piece that begins at p n is entry p; a piece that begins a
row elsewhere is entry num_programs + row. Hence a row's k-th piece (k >= 1) is entry first_granule // n + k,
there are at most num_programs + num_rows pieces, and they bound the memory of partial results. A row with
more than one piece is a cut row, and there are fewer of those than programs.

Prefill rows (query_len > 1). An item is up to query_tile consecutive queries of a row; items are sorted by
the number of tokens before their last query, the longest first, ties by row.

Owns the two lists. Attends nothing.
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

GRANULE = 64
"""Tokens in a granule of decode work."""
ENTRY_FIELDS = 8
CUT_FIELDS = 4
ITEM_FIELDS = 5

_NO_WINDOW = 2**31 - 1
# Entries that one program of a list's kernel writes.
_ENTRIES_A_PROGRAM = 16
_MIN_ROWS = 16


@dataclass(frozen=True, slots=True)
class DecodeWorkList:
    """entries: [num_programs + num_rows, 8] int32, cuts: [num_cuts, 4] int32, contiguous, on the device.

    An entry is (token, slot, first position, one past the last position, number of entries that its program
    takes after it, the first of those, whether it is the row's only piece, 0). Programs take entry p, then
    those that follow, one after the other; an entry whose positions are empty is nothing to do. A cut is
    (token, entry of the row's first piece, e, number of pieces), its k-th piece being entry e + k for k >= 1;
    a cut with no pieces is nothing to do. num_cuts is min(num_rows, num_programs - 1).
    """

    entries: Tensor
    cuts: Tensor
    num_programs: int


@dataclass(frozen=True, slots=True)
class PrefillWorkList:
    """items: [max_items, 5] int32, num_items: [1] int32, contiguous, on the device.

    An item is (first token, number of queries, position of the first query, slot, tokens of the row's whole
    context). What stands behind the first num_items items is not defined.
    """

    items: Tensor
    num_items: Tensor
    query_tile: int


def max_prefill_items(num_tokens: int, num_rows: int, query_tile: int) -> int:
    """The most items that a batch of these sizes can have; at least 1.

    A row of q > 1 tokens has ceil(q / query_tile) items, so n such rows have at most
    (num_tokens + n (query_tile - 1)) / query_tile, and n is at most num_tokens / 2.
    """
    num_prefill_rows = min(num_rows, num_tokens // 2)
    return max(1, (num_tokens + num_prefill_rows * (query_tile - 1)) // query_tile)


def decode_work_list_ref(
    query_lens: Tensor,
    context_lens: Tensor,
    *,
    query_starts: Tensor,
    row_slots: Tensor,
    sliding_window: int | None,
    out: DecodeWorkList,
) -> DecodeWorkList:
    """See the module's docstring; arguments as in `decode_work_list`."""
    num_programs = out.num_programs
    spans = []  # each row's first position, end, first granule and end
    end = 0
    for query_len, context_len in zip(query_lens.tolist(), context_lens.tolist(), strict=True):
        context_len = context_len if query_len == 1 else 0
        first = max(0, context_len - (sliding_window or _NO_WINDOW))
        start, end = end, end + -(-(context_len - first) // GRANULE)
        spans.append((first, context_len, start, end))
    share = max(1, -(-end // num_programs))
    entries, cuts = torch.zeros_like(out.entries), []
    for row, (first, context_len, start, end) in enumerate(spans):
        if start == end:
            continue
        begins = [start, *range((start // share + 1) * share, end, share)]
        pieces = [begin // share if begin % share == 0 else num_programs + row for begin in begins]
        token, slot = int(query_starts[row]), int(row_slots[row])
        for entry, begin, finish in zip(pieces, begins, [*begins[1:], end], strict=True):
            positions = (
                first + (begin - start) * GRANULE,
                min(context_len, first + (finish - start) * GRANULE),
            )
            following = (0, 0) if entry >= num_programs else (0, num_programs + row + 1)
            entries[entry] = torch.tensor([token, slot, *positions, *following, len(pieces) == 1, 0])
        if start % share:
            before = entries[start // share]  # the program that comes to this row in its course
            before[4] = row + 1 - (before[5] - num_programs)
        if len(pieces) > 1:
            cuts.append([token, pieces[0], start // share, len(pieces)])
    out.entries.copy_(entries)
    out.cuts.zero_()
    if cuts:
        out.cuts[: len(cuts)] = torch.tensor(cuts, dtype=torch.int32)
    return out


@triton.jit(do_not_specialize=["num_rows", "num_programs", "num_cuts", "sliding_window"])
def _decode_work_list_kernel(
    query_lens,
    context_lens,
    query_starts,
    row_slots,
    entries,
    cuts,
    num_rows,
    num_programs,
    num_cuts,
    sliding_window,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    GRANULE: tl.constexpr,
    ENTRY_FIELDS: tl.constexpr,
    CUT_FIELDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Every program measures all rows, which is cheap, and writes ENTRIES entries and cuts."""
    wait_for_predecessor(PDL)
    release_successor(PDL)
    rows = tl.arange(0, ROWS)
    is_row = rows < num_rows
    is_decode = tl.load(query_lens + rows, mask=is_row, other=0) == 1
    contexts = tl.load(context_lens + rows, mask=is_row & is_decode, other=0).to(tl.int32)
    granules = tl.cdiv(contexts - tl.maximum(contexts - sliding_window, 0), GRANULE)
    ends = tl.cumsum(granules, 0)
    num_granules = tl.sum(granules, 0)
    share = tl.maximum(tl.cdiv(num_granules, num_programs), 1)

    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    is_program = entry < num_programs
    row = tl.sum((ends[None, :] <= (entry * share)[:, None]).to(tl.int32), 1)
    row = tl.where(is_program, row, entry - num_programs)
    here = rows[None, :] == row[:, None]
    row_end = tl.sum(tl.where(here, ends[None, :], 0), 1)
    row_start = row_end - tl.sum(tl.where(here, granules[None, :], 0), 1)
    context = tl.sum(tl.where(here, contexts[None, :], 0), 1)
    begin = tl.where(is_program, entry * share, row_start)
    is_used = tl.where(is_program, begin < num_granules, (row_start < row_end) & (begin % share != 0))
    limit = tl.minimum((begin // share + 1) * share, num_granules)
    finish = tl.minimum(limit, row_end)
    last_row = tl.sum((ends[None, :] < limit[:, None]).to(tl.int32), 1)
    first = tl.maximum(context - sliding_window, 0)
    takes_more = is_used & is_program

    token = tl.load(query_starts + row, mask=is_used, other=0).to(tl.int32)
    slot = tl.load(row_slots + row, mask=is_used, other=0).to(tl.int32)
    to = entries + entry * ENTRY_FIELDS
    is_entry = entry < num_programs + num_rows
    from_position = first + (begin - row_start) * GRANULE
    to_position = tl.minimum(context, first + (finish - row_start) * GRANULE)
    tl.store(to, token, mask=is_entry)
    tl.store(to + 1, slot, mask=is_entry)
    tl.store(to + 2, tl.where(is_used, from_position, 0), mask=is_entry)
    tl.store(to + 3, tl.where(is_used, to_position, 0), mask=is_entry)
    tl.store(to + 4, tl.where(takes_more, last_row - row, 0), mask=is_entry)
    tl.store(to + 5, tl.where(takes_more, num_programs + row + 1, 0), mask=is_entry)
    is_whole = is_used & (begin == row_start) & (finish == row_end)
    tl.store(to + 6, is_whole.to(tl.int32), mask=is_entry)
    tl.store(to + 7, tl.zeros_like(entry), mask=is_entry)

    starts = ends - granules
    pieces = tl.where(granules > 0, (ends - 1) // share - starts // share + 1, 0)
    cut_ends = tl.cumsum((pieces > 1).to(tl.int32), 0)
    cut_row = tl.sum((cut_ends[None, :] <= entry[:, None]).to(tl.int32), 1)
    here = rows[None, :] == cut_row[:, None]
    start = tl.sum(tl.where(here, starts[None, :], 0), 1)
    num_pieces = tl.sum(tl.where(here, pieces[None, :], 0), 1)
    is_used = num_pieces > 0
    first_entry = tl.where(start % share == 0, start // share, num_programs + cut_row)
    token = tl.load(query_starts + cut_row, mask=is_used, other=0).to(tl.int32)
    to = cuts + entry * CUT_FIELDS
    is_cut = entry < num_cuts
    tl.store(to, token, mask=is_cut)
    tl.store(to + 1, tl.where(is_used, first_entry, 0), mask=is_cut)
    tl.store(to + 2, tl.where(is_used, start // share, 0), mask=is_cut)
    tl.store(to + 3, num_pieces, mask=is_cut)


def decode_work_list(
    query_lens: Tensor,
    context_lens: Tensor,
    *,
    query_starts: Tensor,
    row_slots: Tensor,
    sliding_window: int | None,
    max_num_rows: int,
    out: DecodeWorkList,
) -> DecodeWorkList:
    """Share out the decode rows, into `out`. One kernel serves all batches of up to max_num_rows rows.

    query_lens, context_lens, row_slots: [num_rows] int64; query_starts: [num_rows + 1] int64. Every entry and
    every cut of `out` is written.
    """
    num_rows = len(query_lens)
    assert num_rows <= max_num_rows and len(out.entries) == out.num_programs + num_rows
    if not runs_triton(query_lens):
        return decode_work_list_ref(
            query_lens,
            context_lens,
            query_starts=query_starts,
            row_slots=row_slots,
            sliding_window=sliding_window,
            out=out,
        )
    _decode_work_list_kernel[(triton.cdiv(len(out.entries), _ENTRIES_A_PROGRAM),)](
        query_lens,
        context_lens,
        query_starts,
        row_slots,
        out.entries,
        out.cuts,
        num_rows,
        out.num_programs,
        len(out.cuts),
        sliding_window or _NO_WINDOW,
        ROWS=triton.next_power_of_2(max(max_num_rows, _MIN_ROWS)),
        ENTRIES=_ENTRIES_A_PROGRAM,
        GRANULE=GRANULE,
        ENTRY_FIELDS=ENTRY_FIELDS,
        CUT_FIELDS=CUT_FIELDS,
        num_warps=8,
        **launch_options(query_lens.device),
    )
    return out


def prefill_work_list_ref(
    query_lens: Tensor,
    context_lens: Tensor,
    *,
    query_starts: Tensor,
    row_slots: Tensor,
    out: PrefillWorkList,
) -> PrefillWorkList:
    """See the module's docstring; arguments as in `prefill_work_list`."""
    items = []
    for row, (query_len, context_len) in enumerate(
        zip(query_lens.tolist(), context_lens.tolist(), strict=True)
    ):
        for first in range(0, query_len if query_len > 1 else 0, out.query_tile):
            num_queries = min(out.query_tile, query_len - first)
            position = context_len - query_len + first
            token, slot = int(query_starts[row]) + first, int(row_slots[row])
            item = [token, num_queries, position, slot, context_len]
            items.append((-(position + num_queries), row, item))
    if items:
        out.items[: len(items)] = torch.tensor([item for _, _, item in sorted(items)], dtype=torch.int32)
    out.num_items.fill_(len(items))
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _prefill_work_list_kernel(
    query_lens,
    context_lens,
    query_starts,
    row_slots,
    items,
    num_items,
    num_rows,
    ROWS: tl.constexpr,
    ITEMS: tl.constexpr,
    ITEM_FIELDS: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """An item's place is the number of items before it, counted row by row in closed form."""
    wait_for_predecessor(PDL)
    release_successor(PDL)
    rows = tl.arange(0, ROWS)
    is_row = rows < num_rows
    queries = tl.load(query_lens + rows, mask=is_row, other=0).to(tl.int32)
    queries = tl.where(queries > 1, queries, 0)
    contexts = tl.load(context_lens + rows, mask=is_row, other=0).to(tl.int32)
    tiles = tl.cdiv(queries, QUERY_TILE)
    cached = contexts - queries  # tokens before the row's first query
    ends = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0)
    if tl.program_id(0) == 0:
        tl.store(num_items, total)

    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    is_item = item < total
    row = tl.sum((ends[None, :] <= item[:, None]).to(tl.int32), 1)
    here = rows[None, :] == row[:, None]
    row_queries = tl.sum(tl.where(here, queries[None, :], 0), 1)
    row_cached = tl.sum(tl.where(here, cached[None, :], 0), 1)
    first = (item - tl.sum(tl.where(here, (ends - tiles)[None, :], 0), 1)) * QUERY_TILE
    num_queries = tl.minimum(row_queries - first, QUERY_TILE)
    length = row_cached + first + num_queries

    # A row's items that end behind `length` stand before this one, and those that end there in earlier rows.
    beyond = length[:, None] - (rows[None, :] < row[:, None]).to(tl.int32)
    shorter = tl.minimum(tl.maximum(beyond - cached[None, :], 0) // QUERY_TILE, tiles[None, :] - 1)
    longer = tl.where((beyond < contexts[None, :]) & (tiles[None, :] > 0), tiles[None, :] - shorter, 0)
    to = items + tl.sum(longer, 1) * ITEM_FIELDS
    token = tl.load(query_starts + row, mask=is_item, other=0).to(tl.int32)
    slot = tl.load(row_slots + row, mask=is_item, other=0).to(tl.int32)
    tl.store(to, token + first, mask=is_item)
    tl.store(to + 1, num_queries, mask=is_item)
    tl.store(to + 2, row_cached + first, mask=is_item)
    tl.store(to + 3, slot, mask=is_item)
    tl.store(to + 4, row_cached + row_queries, mask=is_item)


def prefill_work_list(
    query_lens: Tensor,
    context_lens: Tensor,
    *,
    query_starts: Tensor,
    row_slots: Tensor,
    max_num_rows: int,
    out: PrefillWorkList,
) -> PrefillWorkList:
    """Cut the prefill rows' queries into items, into `out`, whose max_items must suffice for the batch.

    query_lens, context_lens, row_slots: [num_rows] int64; query_starts: [num_rows + 1] int64.
    """
    assert len(query_lens) <= max_num_rows
    if not runs_triton(query_lens):
        return prefill_work_list_ref(
            query_lens, context_lens, query_starts=query_starts, row_slots=row_slots, out=out
        )
    _prefill_work_list_kernel[(triton.cdiv(len(out.items), _ENTRIES_A_PROGRAM),)](
        query_lens,
        context_lens,
        query_starts,
        row_slots,
        out.items,
        out.num_items,
        len(query_lens),
        ROWS=triton.next_power_of_2(max(max_num_rows, _MIN_ROWS)),
        ITEMS=_ENTRIES_A_PROGRAM,
        ITEM_FIELDS=ITEM_FIELDS,
        QUERY_TILE=out.query_tile,
        num_warps=8,
        **launch_options(query_lens.device),
    )
    return out
