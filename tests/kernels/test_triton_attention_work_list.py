from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from graphllm.kernels.attention_work_list import (
    GRANULE,
    ITEM_FIELDS,
    DecodeWorkList,
    PrefillWorkList,
    decode_work_list,
    decode_work_list_ref,
    max_prefill_items,
    prefill_work_list,
    prefill_work_list_ref,
)
from graphllm.kernels.paged_decode_attention import num_decode_programs
from tests.kernels.attention_batch import integers
from tests.kernels.device import DEVICE

pytestmark = pytest.mark.triton

Rows = list[tuple[int, int]]
MULTIPROCESSORS_OF_AN_H100 = 132


def random_rows(seed: int) -> Rows:
    """(query_len, context_len) each: decode rows, prefill rows, padding."""
    chance = random.Random(seed)
    decodes = [
        (1, chance.choice([1, 63, 64, 65, chance.randint(1, 900)])) for _ in range(chance.randint(0, 12))
    ]
    contexts = [chance.randint(2, 300) for _ in range(chance.randint(0, 5))]
    prefills = [(chance.randint(2, context), context) for context in contexts]
    return [*decodes, *prefills, *[(0, 0)] * chance.randint(1, 3)]


def tensors_of(rows: Rows) -> dict[str, torch.Tensor]:
    lens = torch.tensor(rows)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), lens[:, 0].cumsum(0)))
    slots = torch.randperm(2 * len(rows), generator=torch.Generator().manual_seed(0))[: len(rows)]
    return {
        "query_lens": lens[:, 0].contiguous().to(DEVICE),
        "context_lens": lens[:, 1].contiguous().to(DEVICE),
        "query_starts": starts.to(DEVICE),
        "row_slots": slots.to(DEVICE),
    }


def empty_decode_list(num_rows: int, num_programs: int) -> DecodeWorkList:
    return DecodeWorkList(
        entries=integers(num_programs + num_rows, 8),
        cuts=integers(min(num_rows, num_programs - 1), 4),
        num_programs=num_programs,
    )


def share_out(rows: Rows, *, num_programs: int, sliding_window: int | None = None) -> DecodeWorkList:
    return decode_work_list(
        **tensors_of(rows),
        sliding_window=sliding_window,
        max_num_rows=64,
        out=empty_decode_list(len(rows), num_programs),
    )


def entries_of_programs(work: DecodeWorkList) -> list[list[int]]:
    """The numbers of the entries that each program takes, those that are nothing to do left out."""
    entries = work.entries.tolist()
    taken = [[p, *range(entries[p][5], entries[p][5] + entries[p][4])] for p in range(work.num_programs)]
    return [[entry for entry in program if entries[entry][2] < entries[entry][3]] for program in taken]


def cut_up(rows: Rows, query_tile: int) -> tuple[list[list[int]], int]:
    """The items that are there, and for how many there was room."""
    max_items = max_prefill_items(sum(query_len for query_len, _ in rows), len(rows), query_tile)
    out = PrefillWorkList(integers(max_items, ITEM_FIELDS), integers(1), query_tile)
    work = prefill_work_list(**tensors_of(rows), max_num_rows=64, out=out)
    num_items = int(work.num_items)
    assert (work.items[num_items:] == -7).all()
    return work.items[:num_items].tolist(), max_items


@pytest.mark.parametrize("sliding_window", [None, 1, 64, 200])
@pytest.mark.parametrize("seed", range(6))
def test_lists_are_those_of_the_references(seed: int, sliding_window: int | None) -> None:
    rows, num_programs = random_rows(seed), 1 + seed * 2
    actual = share_out(rows, num_programs=num_programs, sliding_window=sliding_window)
    expected = decode_work_list_ref(
        **tensors_of(rows), sliding_window=sliding_window, out=empty_decode_list(len(rows), num_programs)
    )
    assert torch.equal(actual.entries, expected.entries)
    assert torch.equal(actual.cuts, expected.cuts)
    items, max_items = cut_up(rows, 5)
    expected_items = prefill_work_list_ref(
        **tensors_of(rows), out=PrefillWorkList(integers(max_items, ITEM_FIELDS), integers(1), 5)
    )
    assert items == expected_items.items[: len(items)].tolist()
    assert len(items) == int(expected_items.num_items)


@pytest.mark.parametrize("seed", range(12))
def test_every_visible_token_of_a_decode_row_is_attended_once(seed: int) -> None:
    chance, rows = random.Random(seed), random_rows(seed)
    sliding_window = chance.choice([None, 1, 63, 64, 150])
    tensors = tensors_of(rows)
    work = share_out(rows, num_programs=chance.randint(1, 9), sliding_window=sliding_window)
    entries, starts, slots = (
        x.tolist() for x in (work.entries, tensors["query_starts"], tensors["row_slots"])
    )
    taken = [entry for program in entries_of_programs(work) for entry in program]
    assert len(set(taken)) == len(taken)
    attended: dict[tuple[int, int], list[int]] = {}
    for entry in taken:
        token, slot, first, last = entries[entry][:4]
        attended.setdefault((token, slot), []).extend(range(first, last))
    expected = {}
    for (query_len, context_len), start, slot in zip(rows, starts[:-1], slots, strict=True):
        if query_len == 1:
            expected[start, slot] = list(range(max(0, context_len - (sliding_window or 9999)), context_len))
    assert {key: sorted(positions) for key, positions in attended.items()} == expected


@pytest.mark.parametrize("seed", range(12))
def test_cuts_name_the_pieces_of_a_row_in_order(seed: int) -> None:
    rows = random_rows(seed)
    work = share_out(rows, num_programs=1 + seed)
    entries = work.entries.tolist()
    whole = {entry[0] for entry in entries if entry[6]}
    cut: dict[int, list[tuple[int, int]]] = {}
    for token, first, rest, num_pieces in work.cuts.tolist():
        if num_pieces:
            pieces = [first, *range(rest + 1, rest + num_pieces)]
            assert all(entries[piece][0] == token and not entries[piece][6] for piece in pieces)
            cut[token] = [(entries[piece][2], entries[piece][3]) for piece in pieces]
    for spans in cut.values():
        assert all(before[1] == after[0] for before, after in pairwise(spans))
    starts = tensors_of(rows)["query_starts"].tolist()
    decodes = {start for (query_len, _), start in zip(rows, starts[:-1], strict=True) if query_len == 1}
    assert whole | set(cut) == decodes and not whole & set(cut)


def test_one_long_row_among_short_ones_is_shared_by_all_programs() -> None:
    rows = [(1, 16384), *[(1, 512)] * 63]
    num_programs = num_decode_programs(MULTIPROCESSORS_OF_AN_H100, 8)
    work = share_out(rows, num_programs=num_programs)
    entries = work.entries.tolist()
    tokens = [sum(entries[e][3] - entries[e][2] for e in taken) for taken in entries_of_programs(work)]
    assert sum(tokens) == 16384 + 63 * 512
    assert max(tokens) <= 1.15 * sum(tokens) / num_programs + GRANULE


def test_a_batch_of_one_fills_the_card() -> None:
    num_programs = num_decode_programs(MULTIPROCESSORS_OF_AN_H100, 8)
    work = share_out([(1, 131072)], num_programs=num_programs)
    busy = [taken for taken in entries_of_programs(work) if taken]
    assert len(busy) >= 0.95 * num_programs
    assert work.cuts[0, 3] == len(busy)


@pytest.mark.parametrize("query_tile", [1, 5, 32, 128])
@pytest.mark.parametrize("seed", range(4))
def test_every_query_of_a_prefill_row_is_in_one_item(seed: int, query_tile: int) -> None:
    rows = random_rows(seed)
    tensors = tensors_of(rows)
    items, _ = cut_up(rows, query_tile)
    found = [
        (token + i, position + i, slot, length)
        for token, num_queries, position, slot, length in items
        for i in range(num_queries)
    ]
    expected = [
        (start + i, context_len - query_len + i, slot, context_len)
        for (query_len, context_len), start, slot in zip(
            rows, tensors["query_starts"].tolist()[:-1], tensors["row_slots"].tolist(), strict=True
        )
        if query_len > 1
        for i in range(query_len)
    ]
    assert sorted(found) == sorted(expected)
    assert all(0 < num_queries <= query_tile for _, num_queries, _, _, _ in items)
    lengths = [position + num_queries for _, num_queries, position, _, _ in items]
    assert lengths == sorted(lengths, reverse=True)


def test_there_is_room_for_the_most_items() -> None:
    """Rows of two tokens make the most items; one more token makes each a second one."""
    items, max_items = cut_up([(2, 2)] * 10, 2)
    assert len(items) == 10 and max_items >= 10
    items, max_items = cut_up([(3, 3)] * 10, 2)
    assert len(items) == 20 and max_items >= 20
