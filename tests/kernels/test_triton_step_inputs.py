"""The step-input kernels against loops in Python."""

from __future__ import annotations

import random

import pytest

from graphllm.kernels import step_inputs as module
from graphllm.kernels.step_inputs import step_inputs
from tests.kernels.device import DEVICE
from tests.kernels.test_step_inputs import (
    MAX_BLOCKS,
    NUM_GROUPS,
    NUM_SLOTS,
    Step,
    expected_inputs,
    written_inputs,
)

pytestmark = pytest.mark.triton


def _random_step(seed: int, *, is_decode: bool) -> Step:
    rng = random.Random(seed)
    block_size = rng.choice([1, 16, 48])
    num_rows = rng.choice([1, 3, NUM_SLOTS])
    row_slots = rng.sample(range(NUM_SLOTS), num_rows)
    longest = 1 if is_decode else 3 * block_size
    query_lens = [rng.choice([0, 1, 1, longest]) for _ in row_slots]
    num_computed = [rng.randrange(MAX_BLOCKS * block_size - longest + 1) for _ in range(NUM_SLOTS)]
    num_tokens = num_rows if is_decode else max(sum(query_lens) + rng.choice([0, 1, 40]), 1)
    pair_rows = [rng.randrange(num_rows) for _ in range(rng.choice([0, 1, 11]))]
    return Step(row_slots, query_lens, pair_rows, num_computed, block_size, num_tokens, is_decode)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("is_decode", [True, False])
def test_kernel_writes_what_the_formulas_say(is_decode: bool, seed: int) -> None:
    step = _random_step(seed, is_decode=is_decode)
    assert written_inputs(step, step_inputs, device=DEVICE) == expected_inputs(step)


@pytest.mark.parametrize("is_decode", [True, False])
def test_more_rows_and_pairs_than_one_tile_holds(is_decode: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DECODE_TILE", 4)
    monkeypatch.setattr(module, "_ROW_TILE", 4)
    query_lens = [1, 1, 1, 0, 1, 1, 0] if is_decode else [1, 3, 0, 2, 1, 5, 0]
    num_tokens = 7 if is_decode else 15
    for num_pairs in (1, 19):
        pairs = [pair % 7 for pair in range(num_pairs)]
        step = Step(list(range(7)), query_lens, pairs, list(range(7)), 2, num_tokens, is_decode)
        assert written_inputs(step, step_inputs, device=DEVICE) == expected_inputs(step)


@pytest.mark.parametrize("max_row_programs", [1, 5, 2048])
def test_programs_that_share_a_row_write_all_of_its_tiles(
    max_row_programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TOKEN_TILE", 16)
    monkeypatch.setattr(module, "_MAX_ROW_PROGRAMS", max_row_programs)
    step = Step([4, 2], [75, 18], [1, 0], [3, 1, 2, 8, 5, 0, 0], 16, 130, False)
    assert written_inputs(step, step_inputs, device=DEVICE) == expected_inputs(step)


def test_a_row_whose_context_is_full_may_still_be_padding() -> None:
    full = MAX_BLOCKS * 4
    for step in (
        Step([0, 6], [1, 0], [0], [3, 0, 0, 0, 0, 0, full], 4, 2, True),
        Step([0, 6], [2, 0], [0], [3, 0, 0, 0, 0, 0, full], 4, 5, False),
    ):
        assert written_inputs(step, step_inputs, device=DEVICE) == expected_inputs(step)


def test_a_step_of_padding_only_writes_padding() -> None:
    # What a bucket is captured with.
    for is_decode in (True, False):
        step = Step([6] * 4, [0] * 4, [0] * 4, [0] * NUM_SLOTS, 16, 4, is_decode)
        written = written_inputs(step, step_inputs, device=DEVICE)
        assert written == expected_inputs(step)
        assert written["slot_mapping"] == [[-1] * 4] * NUM_GROUPS
        assert all(0 <= token < 4 for token in written["sampled_tokens"])
