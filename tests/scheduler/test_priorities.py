"""Priority comes before arrival: who starts, who waits, and who gives way."""

from __future__ import annotations

import pytest

from graphllm.cache.host_tier import HostTier
from graphllm.sequence import Sequence, SequenceGroup
from tests.scheduler.simulated_constraint import SimulatedConstraint
from tests.scheduler.simulated_device import Simulation


def prompt(length: int, *, salt: int = 0) -> list[int]:
    return [(7 * index + salt) % 90 for index in range(length)]


def first(group: SequenceGroup) -> Sequence:
    return group.sequences[0]


def test_requests_start_by_priority_and_then_by_arrival() -> None:
    simulation = Simulation(max_num_seqs=1, max_num_batched_tokens=16)
    priorities = [0, 5, -2, 0, 5, -2]
    groups = [
        simulation.add(prompt(4, salt=index), max_tokens=2, priority=priority)
        for index, priority in enumerate(priorities)
    ]
    started: list[SequenceGroup] = []
    while simulation.scheduler.has_unfinished:
        batch = simulation.launch()
        started += [] if batch is None else [each.sequence.group for each in batch.installs]
        simulation.complete()
    assert started == [groups[index] for index in (2, 5, 0, 3, 1, 4)]
    simulation.assert_all_as_expected()


def test_running_sequence_is_left_alone_while_memory_lasts() -> None:
    simulation = Simulation(max_num_seqs=1, max_num_batched_tokens=16)
    running = simulation.add(prompt(4), max_tokens=6, priority=9)
    simulation.launch()
    simulation.add(prompt(4, salt=1), max_tokens=2, priority=-9)
    simulation.run()
    assert first(running).num_preemptions == 0
    simulation.assert_all_as_expected()


@pytest.mark.parametrize("num_swap_blocks", [0, 40], ids=["recomputation", "swaps"])
def test_lowest_priority_gives_way_even_when_it_is_the_oldest(num_swap_blocks: int) -> None:
    simulation = Simulation(num_blocks=13, block_size=4, host_tier=HostTier(num_swap_blocks=num_swap_blocks))
    groups = [
        simulation.add(prompt(8, salt=salt), max_tokens=30, priority=priority)
        for salt, priority in enumerate([3, 0, 0])
    ]
    while not simulation.scheduler.num_preemptions:
        if len(simulation.device.queue) == simulation.depth:
            simulation.complete()
        simulation.launch()
    assert [first(group).num_preemptions for group in groups] == [1, 0, 0]
    simulation.run()
    assert first(groups[1]).num_preemptions == 0, "the first in order is never preempted"
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()


def test_better_newcomer_starts_before_a_swapped_sequence_comes_back() -> None:
    simulation = Simulation(num_blocks=13, block_size=4, host_tier=HostTier(num_swap_blocks=40))
    groups = [simulation.add(prompt(8, salt=salt), max_tokens=30) for salt in range(3)]
    while not simulation.scheduler.moved:
        if len(simulation.device.queue) == simulation.depth:
            simulation.complete()
        simulation.launch()
    worse = simulation.add(prompt(4, salt=7), max_tokens=4, priority=1)
    better = simulation.add(prompt(4, salt=8), max_tokens=4, priority=-1)
    started: list[SequenceGroup] = []
    while simulation.scheduler.has_unfinished or simulation.device.queue:
        simulation.complete_transfers()
        batch = simulation.launch() if len(simulation.device.queue) < simulation.depth else None
        started += [] if batch is None else [each.sequence.group for each in batch.installs]
        if batch is None and simulation.device.queue:
            simulation.complete()
    assert started.index(better) < min(started.index(groups[2]), started.index(worse))
    simulation.complete_transfers()
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()


def test_pairs_of_constrained_sequences_are_held_and_their_values_are_used_again() -> None:
    simulation = Simulation()
    free = simulation.add(prompt(5), max_tokens=8)
    constrained = simulation.add(prompt(6, salt=1), max_tokens=8, n=2)
    for sequence in constrained.sequences:
        sequence.constraint = SimulatedConstraint()
    batches = []
    for _ in range(3):
        batch = simulation.launch()
        assert batch is not None
        batches.append(batch)
        simulation.device.sample({})
        simulation.complete()
        assert {pair.sequence.group: pair.held for pair in batch.pairs} == {free: False, constrained: True}
        assert len(batch.pairs) == 3, "siblings that join are held too"
    assert all(new is old for new, old in zip(batches[2].pairs, batches[1].pairs, strict=True))
