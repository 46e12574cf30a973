"""The arithmetic of windows, against sets of positions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphllm.cache.block_layout import BlockLayout

block_sizes = st.sampled_from([1, 2, 4, 16])
windows_of_groups = st.lists(st.one_of(st.none(), st.integers(1, 40)), min_size=1, max_size=4).map(tuple)


def columns_seen(num_tokens: int, window: int | None, block_size: int) -> set[int]:
    """Of the columns that exist, those that a query behind the tokens sees, its own token's included."""
    first = 0 if window is None else num_tokens - window + 1
    num_columns = -(-num_tokens // block_size)
    seen = {position // block_size for position in range(max(0, first), num_tokens + 1)}
    return {column for column in seen if column < num_columns}


@given(block_size=block_sizes, windows=windows_of_groups, num_tokens=st.integers(0, 200))
def test_needed_are_the_columns_that_the_next_token_sees(
    block_size: int, windows: tuple[int | None, ...], num_tokens: int
) -> None:
    layout = BlockLayout(block_size, windows)
    num_columns = layout.num_columns(num_tokens)
    seen = [columns_seen(num_tokens, window, block_size) for window in windows]
    for window, columns in zip(windows, seen, strict=True):
        assert set(range(layout.first_column(num_tokens, window), num_columns)) == columns
    assert layout.num_needed(num_tokens, num_settled=num_tokens) == sum(map(len, seen))


@given(
    block_size=block_sizes,
    windows=windows_of_groups,
    chunks=st.lists(st.integers(1, 24), min_size=1, max_size=20),
)
def test_a_sequence_never_holds_more_than_is_planned(
    block_size: int, windows: tuple[int | None, ...], chunks: list[int]
) -> None:
    layout = BlockLayout(block_size, windows)
    most = layout.num_at_most(sum(chunks), max_step_tokens=max(chunks))
    num_computed = 0
    for chunk in chunks:
        settled = max(0, num_computed - 1)  # a token in flight
        held = layout.num_needed(num_computed + chunk, num_settled=settled)
        assert held <= most
        for window in windows:
            num_columns = layout.num_columns(num_computed + chunk) - layout.first_column(settled, window)
            assert num_columns <= layout.most_columns(window, max(chunks))
        num_computed += chunk


@given(
    block_size=block_sizes,
    windows=windows_of_groups,
    num_columns=st.integers(0, 30),
    present=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 29))),
)
def test_longest_prefix_is_the_longest_one_and_looks_at_each_block_once(
    block_size: int, windows: tuple[int | None, ...], num_columns: int, present: set[tuple[int, int]]
) -> None:
    layout = BlockLayout(block_size, windows)
    asked: list[tuple[int, int]] = []

    def is_present(group: int, column: int) -> bool:
        asked.append((group, column))
        return (group, column) in present

    def can_start(count: int) -> bool:
        return all(
            (group, column) in present
            for group, window in enumerate(windows)
            if window is not None
            for column in columns_seen(count * block_size, window, block_size)
        )

    expected = max(count for count in range(num_columns + 1) if can_start(count))
    assert layout.longest_prefix(num_columns, is_present) == expected
    assert len(set(asked)) == len(asked)


@given(
    block_size=block_sizes, windows=windows_of_groups, num_blocks=st.integers(0, 60), step=st.integers(1, 64)
)
def test_longest_fitting_fits_and_one_column_more_does_not(
    block_size: int, windows: tuple[int | None, ...], num_blocks: int, step: int
) -> None:
    layout = BlockLayout(block_size, windows)
    longest = layout.longest_fitting(num_blocks, max_step_tokens=step, at_most=1000)
    assert layout.num_at_most(longest, max_step_tokens=step) <= num_blocks or longest == 0
    if longest < 1000:
        assert layout.num_at_most(longest + block_size, max_step_tokens=step) > num_blocks


@pytest.mark.parametrize("windows", [(None,), (None, None)])
def test_without_windows_a_table_is_all_there_is(windows: tuple[None, ...]) -> None:
    layout = BlockLayout(16, windows)
    assert layout.num_at_most(100, max_step_tokens=8) == 7 * len(windows)
    assert layout.num_needed(100, num_settled=90) == 7 * len(windows)
    assert layout.longest_prefix(5, lambda group, column: False) == 5
