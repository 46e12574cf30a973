"""The speeds of copies and prompts, as they are measured while serving."""

from __future__ import annotations

import pytest

from graphllm.batch import ScheduledBatch, ScheduledRow
from graphllm.engine.measured_rates import MeasuredRates
from graphllm.sampling_params import SamplingParams
from graphllm.sequence import SequenceGroup


def step(*num_tokens: int) -> ScheduledBatch:
    """Rows of so many tokens, the decode rows first."""
    group = SequenceGroup("r", [1], params=SamplingParams(), seed=0, max_total_tokens=9)
    rows = [ScheduledRow(group.sequences[0], slot, tokens) for slot, tokens in enumerate(num_tokens)]
    return ScheduledBatch(step_id=1, rows=rows, num_decode_rows=sum(tokens == 1 for tokens in num_tokens))


def test_the_first_measurement_takes_the_place_of_the_guess_and_later_ones_move_it() -> None:
    rates = MeasuredRates(bytes_per_block=10**6)
    assert rates.seconds_to_copy(10) == pytest.approx(1e-3)
    rates.observe_copy(4, 0.8)
    assert rates.seconds_to_copy(10) == pytest.approx(2.0)
    rates.observe_copy(4, 0.4)
    assert rates.seconds_to_copy(10) == pytest.approx(1.5, rel=0.01)
    for _ in range(100):
        rates.observe_copy(100, 5.0)
    assert rates.seconds_to_copy(10) == pytest.approx(0.5, rel=0.01)


def test_small_copies_and_short_prompts_do_not_hide_what_a_long_prefix_costs() -> None:
    rates = MeasuredRates(bytes_per_block=10**6)
    for _ in range(3):
        rates.observe_step(step(2_000), 0.2)
        rates.observe_copy(500, 0.05)
        for _ in range(10):
            rates.observe_step(step(1, 10), 0.01)
            rates.observe_copy(1, 1e-3)
    assert rates.seconds_to_prefill(2_000) == pytest.approx(0.2, rel=0.5)
    assert rates.seconds_to_copy(500) == pytest.approx(0.05, rel=0.5)


def test_only_steps_that_are_mostly_prompt_tell_what_a_prompt_costs() -> None:
    rates = MeasuredRates(bytes_per_block=10**6)
    rates.observe_step(step(100), 1.0)
    assert rates.seconds_to_prefill(200) == pytest.approx(2.0)
    rates.observe_step(step(*[1] * 60, 40), 50.0)
    rates.observe_step(step(1, 1, 1), 50.0)
    assert rates.seconds_to_prefill(200) == pytest.approx(2.0)
    rates.observe_step(step(1, 100), 2.0)
    assert rates.seconds_to_prefill(200) == pytest.approx(3.0, rel=0.01)


def test_no_rows_say_nothing() -> None:
    rates = MeasuredRates(bytes_per_block=1)
    before = rates.seconds_to_prefill(1)
    rates.observe_step(step(), 1.0)
    assert rates.seconds_to_prefill(1) == before
