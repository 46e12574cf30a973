"""When memory runs out the newest moves to the host and comes back, and nobody's tokens change."""

from __future__ import annotations

import random

import pytest

from graphllm.batch import ScheduledBatch
from graphllm.cache.host_tier import HostTier
from graphllm.sequence import SequenceStatus
from tests.scheduler.simulated_device import Simulation


def prompt(length: int, *, salt: int = 0) -> list[int]:
    return [(7 * index + salt) % 90 for index in range(length)]


def crowded(*, num_swap_blocks: int = 40, num_requests: int = 3, **options: int) -> Simulation:
    """Three sequences of 38 tokens on 12 blocks of 4."""
    simulation = Simulation(
        num_blocks=13, block_size=4, host_tier=HostTier(num_swap_blocks=num_swap_blocks), **options
    )
    for salt in range(num_requests):
        simulation.add(prompt(8, salt=salt), max_tokens=30)
    return simulation


def run_until_swapped(simulation: Simulation) -> ScheduledBatch | None:
    """The step that was launched when somebody had to go."""
    batch = None
    while not any(each.status is SequenceStatus.SWAPPED for each in simulation.scheduler.moved):
        if len(simulation.device.queue) == simulation.depth:
            simulation.complete()
        batch = simulation.launch()
    return batch


def test_newest_is_swapped_and_nothing_is_computed_twice() -> None:
    simulation = crowded()
    num_tokens = 0
    while simulation.scheduler.has_unfinished:
        batch = simulation.launch()
        num_tokens += batch.num_tokens if batch else 0
        simulation.complete_transfers()
        if simulation.device.queue:
            simulation.complete()
    oldest, *_, newest = (group.sequences[0] for group in simulation.groups)
    assert oldest.num_swaps == 0
    assert newest.num_swaps > 0
    counters = simulation.scheduler.counters
    assert counters.num_recomputed == 0
    assert counters.num_swapped_in_blocks == counters.num_swapped_out_blocks > 0
    assert num_tokens == 3 * 37, "each position once, but for the last"
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()


def test_victim_leaves_while_the_others_have_room_for_two_steps() -> None:
    simulation = crowded()
    batch = run_until_swapped(simulation)
    assert batch is not None and len(batch.rows) == 2
    simulation.complete()
    batch = simulation.launch()
    assert batch is not None and len(batch.rows) == 2, "the copy is under way, and nobody waits for it"
    assert len(simulation.device.transfers) == 1
    simulation.run()
    simulation.assert_all_as_expected()


def test_swapped_sequence_owns_no_slot_and_keeps_its_token_in_flight() -> None:
    simulation = crowded()
    run_until_swapped(simulation)
    (victim,) = simulation.scheduler.moved
    assert victim.slot is None
    assert victim.num_in_flight_tokens > 0
    num_tokens = len(victim.token_ids)
    while simulation.device.queue:
        simulation.complete()
    assert len(victim.token_ids) > num_tokens
    simulation.run()
    simulation.assert_all_as_expected()


def test_blocks_are_not_free_before_they_are_copied() -> None:
    simulation = crowded()
    run_until_swapped(simulation)
    (victim,) = simulation.scheduler.moved
    num_leaving = simulation.scheduler.tiers.num_leaving_blocks
    assert num_leaving == len(victim.host_blocks)
    while simulation.device.queue:
        simulation.complete()
    num_held = simulation.manager.num_held_blocks
    simulation.complete_transfers()
    assert simulation.manager.num_held_blocks == num_held - num_leaving


def test_full_host_tier_means_computing_again() -> None:
    simulation = crowded(num_swap_blocks=1)
    simulation.run()
    counters = simulation.scheduler.counters
    assert counters.num_swapped_out_blocks == 0
    assert counters.num_recomputed == counters.num_preemptions > 0
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()


def test_sequence_is_swapped_so_often_and_no_oftener() -> None:
    simulation = crowded(num_requests=6, max_swaps_per_sequence=1)
    simulation.run()
    sequences = [group.sequences[0] for group in simulation.groups]
    assert max(sequence.num_swaps for sequence in sequences) == 1
    assert any(sequence.num_preemptions > sequence.num_swaps for sequence in sequences)
    simulation.assert_all_as_expected()


def test_failed_copy_out_means_computing_again() -> None:
    simulation = crowded()
    run_until_swapped(simulation)
    (victim,) = simulation.scheduler.moved
    while simulation.device.queue:
        simulation.complete()
    simulation.complete_transfers(fail=True)
    assert victim in simulation.scheduler.waiting
    simulation.run()
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()


def test_failed_copy_in_means_computing_again() -> None:
    simulation = crowded()
    run_until_swapped(simulation)
    (victim,) = simulation.scheduler.moved
    while not victim.block_table:  # until its blocks are reserved
        simulation.complete_transfers()
        if simulation.device.queue:
            simulation.complete()
        simulation.launch()
    assert victim.transfer_id is not None
    simulation.complete_transfers(fail=True)
    assert victim in simulation.scheduler.waiting
    assert not victim.block_table
    simulation.run()
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()


def test_abort_of_a_swapped_sequence_frees_both_tiers_once_the_copy_has_ended() -> None:
    simulation = crowded()
    run_until_swapped(simulation)
    (victim,) = simulation.scheduler.moved
    simulation.scheduler.abort(victim.group)
    simulation.scheduler.check()
    assert simulation.host_tier.num_held_blocks > 0
    while simulation.device.queue:
        simulation.complete()
    simulation.complete_transfers()
    assert simulation.host_tier.num_held_blocks == 0
    simulation.run()
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()


def test_shared_cached_blocks_are_not_copied() -> None:
    simulation = Simulation(
        num_blocks=13, block_size=4, host_tier=HostTier(num_swap_blocks=40), enable_prefix_caching=True
    )
    simulation.add(prompt(16), max_tokens=12)
    simulation.launch()
    simulation.complete()
    victim = simulation.add([*prompt(16), 1], max_tokens=12).sequences[0]
    simulation.launch()
    simulation.complete()
    simulation.scheduler._preemption.preempt(victim)
    assert [isinstance(entry, bytes) for entry in victim.host_blocks] == [True] * 4 + [False]
    assert simulation.scheduler.counters.num_swapped_out_blocks == 1
    simulation.scheduler.check()
    simulation.run()
    assert simulation.scheduler.counters.num_swapped_in_blocks == 1
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()


def test_swapped_sequence_whose_shared_blocks_vanished_is_computed_again() -> None:
    simulation = Simulation(
        num_blocks=13, block_size=4, host_tier=HostTier(num_swap_blocks=40), enable_prefix_caching=True
    )
    other = simulation.add(prompt(16), max_tokens=12)
    simulation.launch()
    simulation.complete()
    victim = simulation.add([*prompt(16), 1], max_tokens=12).sequences[0]
    simulation.launch()
    simulation.complete()
    simulation.scheduler._preemption.preempt(victim)
    simulation.scheduler.abort(other)
    simulation.launch_transfers()
    simulation.complete_transfers()
    simulation.manager.release(simulation.manager.allocate(12))  # everything cached is gone
    simulation.run()
    assert simulation.scheduler.counters.num_recomputed == 1
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()


def test_somebody_gives_way_when_everybody_has_just_come_back() -> None:
    simulation = crowded()
    run_until_swapped(simulation)
    for sequence in simulation.scheduler.running:
        sequence.min_tokens_to_swap = 1_000
    simulation.run()
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()


def test_oldest_is_never_overtaken_by_those_that_wait() -> None:
    simulation = crowded(num_requests=8)
    ended = []
    while simulation.scheduler.has_unfinished:
        simulation.launch()
        simulation.complete_transfers()
        if simulation.device.queue:
            simulation.complete()
        ended += [group for group in simulation.groups if group.is_finished and group not in ended]
    assert ended == simulation.groups


def test_newcomer_does_not_overtake_a_sequence_on_its_way_to_the_host() -> None:
    simulation = crowded()
    run_until_swapped(simulation)
    (victim,) = simulation.scheduler.moved
    simulation.scheduler.abort(simulation.groups[0])
    newcomer = simulation.add(prompt(4, salt=9), max_tokens=4)
    while simulation.device.queue:
        simulation.complete()
    assert victim.transfer_id is not None, "the copy is late"
    simulation.launch()
    assert newcomer.sequences[0] in simulation.scheduler.waiting
    simulation.run()
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()


def test_unused_share_counts_a_block_that_siblings_share_once() -> None:
    simulation = Simulation(num_blocks=33, block_size=4)
    simulation.add(prompt(5), n=6, max_tokens=8)
    simulation.launch()
    assert simulation.manager.num_held_blocks == 2
    assert simulation.scheduler.unused_share == 3 / 8
    simulation.run()
    assert simulation.scheduler.unused_share == 0.0


@pytest.mark.parametrize("seed", range(10))
def test_unused_share_of_a_chat_like_mix_is_small(seed: int) -> None:
    """Prompts of about 400 tokens and answers of about 200, in blocks of 16."""
    rng = random.Random(seed)
    simulation = Simulation(num_blocks=3_000, block_size=16, max_num_seqs=32, max_num_batched_tokens=512)
    shares = []
    for _ in range(60):
        length = max(16, min(3_000, round(rng.lognormvariate(5.8, 0.7))))
        simulation.add(
            prompt(length, salt=rng.randrange(90)), max_tokens=max(8, round(rng.lognormvariate(5.0, 0.6)))
        )
    scheduler = simulation.scheduler
    while scheduler.has_unfinished:
        batch = scheduler.schedule()
        if batch is not None:
            simulation.device.launch(batch)
        if batch is None or len(simulation.device.queue) == 2:
            done, result = simulation.device.complete()
            assert result is not None
            scheduler.step_completed(done.step_id)
            scheduler.apply(done, result)
        if len(scheduler.running) >= 8:
            shares.append(scheduler.unused_share)
    assert sum(shares) / len(shares) < 0.04
    assert scheduler.unused_share == 0.0
