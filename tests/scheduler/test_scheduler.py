"""The scheduler's policy, step by step, and its invariants under random load."""

from __future__ import annotations

import random

import pytest

from graphllm.outputs import FinishReason
from graphllm.sampling_params import SamplingParams
from graphllm.sequence import SequenceGroup, SequenceStatus
from tests.scheduler.simulated_device import EOS, Simulation, expected_output


def prompt(length: int, *, salt: int = 0) -> list[int]:
    return [(7 * index + salt) % 90 for index in range(length)]


def test_prompt_longer_than_the_budget_is_prefilled_in_chunks() -> None:
    simulation = Simulation(max_num_batched_tokens=16)
    simulation.add(prompt(40))
    chunks = []
    while (batch := simulation.launch()) is not None and batch.rows[0].num_tokens > 1:
        chunks.append((batch.num_tokens, len(batch.pairs)))
        simulation.complete()
    assert chunks == [(16, 0), (16, 0), (8, 1)], "only the last chunk samples"


def test_decodes_go_before_prompt_chunks_and_share_the_budget() -> None:
    simulation = Simulation(max_num_batched_tokens=16)
    first = simulation.add(prompt(4))
    simulation.launch()
    simulation.complete()
    simulation.add(prompt(40, salt=1))
    batch = simulation.launch()
    assert batch is not None
    assert [row.num_tokens for row in batch.rows] == [1, 15]
    assert batch.rows[0].sequence is first.sequences[0]
    assert batch.num_decode_rows == 1


def test_step_is_scheduled_before_the_last_one_is_known() -> None:
    simulation = Simulation()
    group = simulation.add(prompt(5))
    simulation.launch()
    ahead = simulation.launch()
    assert ahead is not None
    assert len(ahead.pairs) == 1
    assert group.sequences[0].num_in_flight_tokens == 2
    assert group.sequences[0].num_output_tokens == 0
    simulation.run()
    simulation.assert_all_as_expected()


def test_no_step_is_scheduled_that_max_tokens_makes_useless() -> None:
    simulation = Simulation()
    simulation.add(prompt(5), max_tokens=2)
    assert simulation.launch() is not None
    assert simulation.launch() is not None
    assert simulation.launch() is None
    simulation.run()
    assert simulation.num_steps == 2


def test_first_come_is_first_served() -> None:
    simulation = Simulation(max_num_seqs=2)
    groups = [simulation.add(prompt(4, salt=salt), max_tokens=4) for salt in range(5)]
    order = []
    while simulation.scheduler.has_unfinished:
        batch = simulation.launch()
        order += [install.sequence.group for install in batch.installs] if batch else []
        simulation.complete()
    assert order == groups


def test_token_after_the_end_is_dropped() -> None:
    simulation = Simulation()
    # Find a prompt whose continuation meets the end token early.
    salt = next(salt for salt in range(90) if EOS in _greedy(salt) and 1 <= _greedy(salt).index(EOS) < 20)
    group = simulation.add(prompt(6, salt=salt), max_tokens=40, ignore_eos=False)
    simulation.run()
    assert group.sequences[0].finish_reason is FinishReason.STOP
    assert group.sequences[0].token_ids[-1] == EOS
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()


def _greedy(salt: int) -> list[int]:
    group = Simulation().add(prompt(6, salt=salt), max_tokens=40)
    return expected_output(group, 0)


def test_siblings_share_the_prompt_and_copy_its_last_block_when_they_write() -> None:
    simulation = Simulation(block_size=4)
    group = simulation.add(prompt(10), n=3, max_tokens=6)
    batch = simulation.launch()
    assert batch is not None
    assert len(batch.pairs) == 3
    assert len({pair.row for pair in batch.pairs}) == 1, "one row's logits feed the whole group"
    tables = [sequence.block_table for sequence in group.sequences]
    assert tables[0] == tables[1] == tables[2]
    partial_block = tables[0][2]
    batch = simulation.launch()
    assert batch is not None
    assert all(table[:2] == tables[0][:2] for table in tables), "full blocks stay shared"
    assert len({table[2] for table in tables}) == 3, "each writes to a partial block of its own"
    assert [source for source, _ in batch.copies] == [partial_block] * 2, "the last one needs no copy"
    simulation.run()
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()


def test_sibling_that_ends_with_its_first_token_costs_no_copy() -> None:
    simulation = Simulation(block_size=4)
    simulation.add(prompt(10), n=3, max_tokens=1)
    while simulation.scheduler.has_unfinished:
        batch = simulation.launch()
        assert batch is None or not batch.copies
        simulation.complete()
    simulation.assert_all_as_expected()


def test_siblings_without_room_compute_the_prompt_themselves() -> None:
    simulation = Simulation(max_num_seqs=2)
    simulation.add(prompt(10), n=5, max_tokens=6)
    simulation.run()
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()


def test_newest_is_preempted_and_its_tokens_do_not_change() -> None:
    simulation = Simulation(num_blocks=13, block_size=4)
    groups = [simulation.add(prompt(8, salt=salt), max_tokens=30) for salt in range(3)]
    simulation.run()
    assert groups[0].sequences[0].num_preemptions == 0
    assert groups[2].sequences[0].num_preemptions > 0
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()


def test_row_is_left_out_rather_than_preempting_behind_a_fence() -> None:
    simulation = Simulation(num_blocks=13, block_size=4)
    for salt in range(3):
        simulation.add(prompt(8, salt=salt), max_tokens=30)
    while simulation.scheduler.num_preemptions == 0:
        if len(simulation.device.queue) == 2:
            simulation.complete()
        simulation.launch()
    # The victim's blocks wait for a step in flight; trying again must not take a second victim.
    assert simulation.manager.num_pending_blocks > 0
    assert simulation.manager.num_free_blocks == 0
    batch = simulation.launch()
    assert simulation.scheduler.num_preemptions == 1
    assert batch is None or len(batch.rows) < 2, "a row without a block is left out"
    simulation.run()
    simulation.assert_all_as_expected()


def test_preempted_sequence_keeps_its_token_in_flight() -> None:
    simulation = Simulation(num_blocks=13, block_size=4)
    for salt in range(3):
        simulation.add(prompt(8, salt=salt), max_tokens=30)
    seen = False
    while simulation.scheduler.has_unfinished:
        stuck = simulation.launch() is None
        victims = [seq for seq in simulation.scheduler.waiting if seq.num_in_flight_tokens]
        lengths = [len(sequence.token_ids) for sequence in victims]
        if stuck or victims or len(simulation.device.queue) == 2:
            simulation.complete()
        seen = seen or any(len(seq.token_ids) > old for seq, old in zip(victims, lengths, strict=True))
    assert seen, "no victim had a token in flight"
    simulation.assert_all_as_expected()


def test_abort_frees_everything_once_the_steps_in_flight_end() -> None:
    simulation = Simulation()
    group = simulation.add(prompt(10), n=2, max_tokens=50)
    other = simulation.add(prompt(6, salt=2), max_tokens=10)
    simulation.launch()
    simulation.launch()
    simulation.scheduler.abort(group)
    assert simulation.manager.num_pending_blocks > 0
    simulation.complete()
    simulation.complete()
    held = {block for sequence in other.sequences for block in sequence.block_table}
    assert simulation.manager.num_held_blocks == len(held)
    simulation.run()
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()


def test_abort_of_a_waiting_request_takes_it_out_of_the_queue() -> None:
    simulation = Simulation(max_num_seqs=1)
    simulation.add(prompt(4))
    waiting = simulation.add(prompt(4, salt=1))
    simulation.launch()
    simulation.scheduler.abort(waiting)
    assert waiting.sequences[0].status is SequenceStatus.FINISHED
    simulation.run()
    simulation.assert_all_as_expected()


def test_stop_token_ids_end_a_sequence_but_not_before_min_tokens() -> None:
    simulation = Simulation()
    output = expected_output(simulation.add(prompt(5), max_tokens=12), 0)
    early, late = output[2], output[7]
    assert early not in output[:2]
    assert late not in output[:7]
    group = SequenceGroup(
        "stopping",
        prompt(5),
        params=SamplingParams(max_tokens=12, min_tokens=5, stop_token_ids=(early, late), ignore_eos=True),
        seed=0,
        max_total_tokens=17,
    )
    simulation.scheduler.add(group)
    simulation.run()
    sequence = group.sequences[0]
    assert (sequence.finish_reason, sequence.stop_reason) == (FinishReason.STOP, late)
    assert sequence.token_ids[5:] == output[:8]


@pytest.mark.parametrize("seed", range(40))
def test_random_load_gives_every_request_its_undisturbed_tokens(seed: int) -> None:
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4, 16])
    longest = 60
    simulation = Simulation(
        num_blocks=1 + -(-longest // block_size) + rng.randrange(0, 40),
        block_size=block_size,
        max_num_seqs=rng.randrange(1, 9),
        max_num_batched_tokens=rng.choice([9, 16, 64]),
        depth=rng.choice([1, 2]),
    )
    for _ in range(12):
        length = rng.randrange(1, 40)
        simulation.add(
            prompt(length, salt=rng.randrange(90)),
            max_tokens=rng.randrange(1, longest - length + 1),
            n=rng.choice([1, 1, 1, 2, 4]),
            ignore_eos=rng.random() < 0.5,
        )
        for _ in range(rng.randrange(0, 6)):
            if len(simulation.device.queue) < simulation.depth and simulation.scheduler.has_unfinished:
                simulation.launch()
            elif simulation.device.queue:
                simulation.complete()
        if rng.random() < 0.2:
            simulation.scheduler.abort(rng.choice(simulation.groups))
    simulation.run(rng=rng)
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()


def test_step_of_unchanged_membership_consists_of_the_last_ones_rows() -> None:
    simulation = Simulation()
    for salt in range(3):
        simulation.add(prompt(5, salt=salt), max_tokens=8)
    simulation.launch()
    first, second = simulation.launch(), simulation.launch()
    assert first is not None and second is not None
    assert all(ours is theirs for ours, theirs in zip(first.rows, second.rows, strict=True))
    assert all(ours is theirs for ours, theirs in zip(first.pairs, second.pairs, strict=True))
    simulation.scheduler.abort(simulation.groups[0])
    third = simulation.launch()
    assert third is not None
    assert [pair.row for pair in third.pairs] == [0, 1]
    assert [row.sequence.group for row in third.rows] == simulation.groups[1:]
    simulation.run()
    simulation.assert_all_as_expected()
