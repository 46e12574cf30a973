from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphllm.attention.row_groups import group_rows, rows_of_similar_length
from tests.attention.paged_batch import paged_batch


@given(st.lists(st.integers(1, 20000), max_size=40))
def test_every_row_is_in_exactly_one_part(context_lens: list[int]) -> None:
    parts = rows_of_similar_length(context_lens)
    assert sorted(row for part in parts for row in part) == list(range(len(context_lens)))
    assert all(parts)


@given(st.lists(st.integers(1, 20000), min_size=1, max_size=64))
def test_padding_stays_below_a_bound_for_each_part(context_lens: list[int]) -> None:
    for part in rows_of_similar_length(context_lens):
        lengths = [context_lens[row] for row in part]
        assert len(lengths) * max(lengths) - sum(lengths) <= 256
        assert len(part) == 1 or len(lengths) * max(lengths) <= 8192


@pytest.mark.parametrize("context_lens", [[200], [200, 203, 190, 201], [17] * 64])
def test_rows_of_like_length_stay_together_and_in_order(context_lens: list[int]) -> None:
    assert rows_of_similar_length(context_lens) == [list(range(len(context_lens)))]


def test_one_long_row_does_not_pad_the_short_ones() -> None:
    parts = rows_of_similar_length([30, 31, 6000, 29])
    assert parts == [[2], [1, 0, 3]]


def test_padding_reads_only_slots_of_the_rows_own_tokens() -> None:
    rows = [(1, 7), (1, 2), (1, 12)]
    batch = paged_batch(rows, num_decode_rows=3)
    (group,) = group_rows(batch.inputs, num_decode_rows=3)
    assert group.is_padded and group.max_context == 12
    slots = group.slots(batch.inputs, 0, block_size=4).view(3, 12)
    for row, (_, context_len) in enumerate(rows):
        table = batch.inputs.groups[0].block_tables[batch.inputs.row_slots[row]].tolist()
        own = [table[position // 4] * 4 + position % 4 for position in range(context_len)]
        assert slots[row].tolist() == own + own[-1:] * (12 - context_len)


def test_no_mask_is_built_where_every_query_sees_every_key() -> None:
    decode = paged_batch([(1, 8), (1, 8)], num_decode_rows=2)
    (group,) = group_rows(decode.inputs, num_decode_rows=2)
    assert group.mask(None, torch.float32) is None
    assert group.mask(8, torch.float32) is None
    mask = group.mask(3, torch.float32)
    assert mask is not None and mask.isinf().sum(-1).flatten().tolist() == [5, 5]


def test_only_a_prompt_from_its_start_is_plainly_causal() -> None:
    batch = paged_batch([(5, 5), (2, 7)])
    whole, chunk = group_rows(batch.inputs, num_decode_rows=0)
    assert whole.is_causal(None) and whole.mask(None, torch.float32) is None
    assert not whole.is_causal(2)
    assert not chunk.is_causal(None)
    mask = chunk.mask(None, torch.float32)
    assert mask is not None
    assert mask[0, 0].tolist() == [[0.0] * 6 + [-torch.inf], [0.0] * 7]


@pytest.mark.parametrize(
    ("rows", "num_decode_rows", "window"),
    [([(1, 40), (1, 90), (1, 3)], 3, 13), ([(5, 90)], 0, 13), ([(1, 14)], 1, 13)],
)
def test_a_window_reads_the_tokens_that_some_query_sees_and_no_others(
    rows: list[tuple[int, int]], num_decode_rows: int, window: int
) -> None:
    batch = paged_batch(rows, num_heads=1, num_kv_heads=1, num_decode_rows=num_decode_rows)
    (group,) = group_rows(batch.inputs, num_decode_rows=num_decode_rows)
    windowed = group.within(window)
    assert windowed is group.within(window) and windowed is not group
    width = window + group.query_len - 1
    seen_slots = windowed.slots(batch.inputs, 0, block_size=4)
    assert seen_slots.shape == (len(rows) * width,)
    all_slots = group.slots(batch.inputs, 0, block_size=4)
    for (_, context_len), slots, whole in zip(
        rows, seen_slots.view(len(rows), -1), all_slots.view(len(rows), -1), strict=True
    ):
        seen = min(width, context_len)
        assert torch.equal(slots[:seen], whole[context_len - seen : context_len])
        assert set(slots.tolist()) <= set(whole[context_len - seen : context_len].tolist())


@pytest.mark.parametrize("window", [None, 40, 500])
def test_a_window_as_wide_as_the_context_changes_nothing(window: int | None) -> None:
    batch = paged_batch([(1, 40), (1, 9)], num_heads=1, num_kv_heads=1, num_decode_rows=2)
    (group,) = group_rows(batch.inputs, num_decode_rows=2)
    assert group.within(window) is group
