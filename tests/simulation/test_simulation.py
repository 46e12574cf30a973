"""A million steps of the real scheduler in small worlds: nothing is lost, nobody who is first starves.

A failing world says which seed it had; `python -m tests.simulation --seed N --steps M` shows it again.
"""

from __future__ import annotations

import pytest

from tests.simulation.episodes import simulate
from tests.simulation.world import STORM, World

NUM_SHARDS = 16
STEPS_OF_A_SHARD = 62_500  # a million in all
SEEDS_OF_A_SHARD = 10_000


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(NUM_SHARDS))
def test_random_worlds_keep_every_invariant(shard: int) -> None:
    outcome = simulate(shard * SEEDS_OF_A_SHARD, STEPS_OF_A_SHARD)
    print(f"{outcome.num_steps} steps, {outcome.num_steps / outcome.seconds:.0f} a CPU second")
    assert outcome.num_steps >= STEPS_OF_A_SHARD
    counters = outcome.counters
    # A simulation in which these never happen proves nothing about them.
    assert counters.num_recomputed > 100
    assert counters.num_swapped_in_blocks > 1_000
    assert counters.num_prefix_hit_tokens > 10_000
    assert counters.num_offloaded_blocks > 1_000
    assert counters.num_fetched_blocks > 30
    assert counters.num_voided_sequences > 0
    assert outcome.num_evicted_blocks > 1_000
    assert outcome.num_passed_blocks > 10_000
    assert outcome.num_constrained_tokens > 10_000
    assert outcome.num_overtakers > 100


def test_same_seed_gives_the_same_world() -> None:
    first, second = World(7), World(7)
    first.run(300)
    second.run(300)
    assert first.scheduler.counters == second.scheduler.counters
    assert first.num_requests == second.num_requests
    assert first.device.memory == second.device.memory


def test_failing_steps_make_readers_of_their_blocks_start_again() -> None:
    num_voided = 0
    for seed in range(12):
        world = World(seed, configuration=STORM)
        world.run(400)
        num_voided += world.scheduler.counters.num_voided_sequences
    assert num_voided > 10
