"""Prompts that share a prefix share its blocks, while and after they run, and never a wrong one."""

from __future__ import annotations

from graphllm.cache.host_tier import HostTier
from graphllm.scheduler.tiers import ConstantRates
from graphllm.sequence import SequenceGroup
from tests.scheduler.simulated_device import Simulation


def prompt(length: int, *, salt: int = 0) -> list[int]:
    return [(7 * index + salt) % 90 for index in range(length)]


def caching(**options: object) -> Simulation:
    return Simulation(enable_prefix_caching=True, **options)  # type: ignore[arg-type]


def run_alone(simulation: Simulation, tokens: list[int], **options: object) -> SequenceGroup:
    group = simulation.add(tokens, **options)  # type: ignore[arg-type]
    simulation.run()
    return group


def test_second_request_computes_only_what_is_new() -> None:
    simulation = caching()
    run_alone(simulation, prompt(20))
    group = simulation.add([*prompt(20), 1, 2, 3])
    batch = simulation.launch()
    assert batch is not None
    assert batch.num_tokens == 3
    assert group.sequences[0].num_cached_tokens == 20
    assert batch.installs[0].num_computed_tokens == 20
    simulation.run()
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()
    counters = simulation.scheduler.counters
    assert (counters.num_prefix_queries_tokens, counters.num_prefix_hit_tokens) == (43, 20)


def test_without_caching_nothing_is_kept() -> None:
    simulation = Simulation()
    run_alone(simulation, prompt(20))
    assert run_alone(simulation, prompt(20)).sequences[0].num_cached_tokens == 0
    assert simulation.manager.num_cached_blocks == 0


def test_wholly_cached_prompt_computes_its_last_block() -> None:
    simulation = caching(block_size=4)
    run_alone(simulation, prompt(16))
    group = simulation.add(prompt(16))
    batch = simulation.launch()
    assert batch is not None
    assert (batch.num_tokens, len(batch.pairs)) == (4, 1)
    assert group.sequences[0].num_cached_tokens == 12
    simulation.run()
    simulation.assert_all_as_expected()


def test_generated_tokens_are_cached_for_the_next_turn() -> None:
    simulation = caching(block_size=4)
    first = run_alone(simulation, prompt(9), max_tokens=12)
    conversation = list(first.sequences[0].token_ids)
    group = run_alone(simulation, [*conversation, 5, 6, 7])
    # The last token of the first answer was sampled but never computed.
    assert group.sequences[0].num_cached_tokens == (len(conversation) - 1) // 4 * 4
    simulation.assert_all_as_expected()


def test_salts_do_not_see_each_other() -> None:
    simulation = caching()
    run_alone(simulation, prompt(20), cache_salt="a")
    assert run_alone(simulation, prompt(20), cache_salt="b").sequences[0].num_cached_tokens == 0
    assert run_alone(simulation, prompt(20)).sequences[0].num_cached_tokens == 0
    assert run_alone(simulation, prompt(20), cache_salt="a").sequences[0].num_cached_tokens == 16


def test_request_that_needs_every_position_looks_nothing_up_but_publishes() -> None:
    simulation = caching()
    run_alone(simulation, prompt(20))
    assert run_alone(simulation, prompt(20), skips_prefix_lookup=True).sequences[0].num_cached_tokens == 0
    assert simulation.scheduler.counters.num_prefix_queries_tokens == 20
    run_alone(simulation, prompt(20, salt=3), skips_prefix_lookup=True)
    assert run_alone(simulation, prompt(20, salt=3)).sequences[0].num_cached_tokens == 16
    simulation.assert_all_as_expected()


def test_prompt_is_shared_while_its_step_is_still_running() -> None:
    simulation = caching(max_num_batched_tokens=20)
    first = simulation.add(prompt(20))
    simulation.launch()
    second = simulation.add([*prompt(20), 1])
    batch = simulation.launch()
    assert batch is not None
    assert [row.num_tokens for row in batch.rows] == [1, 1]
    assert second.sequences[0].block_table[:5] == first.sequences[0].block_table[:5]
    simulation.run()
    simulation.assert_all_as_expected()


def test_failed_step_makes_its_readers_start_again() -> None:
    simulation = caching(max_num_batched_tokens=20)
    failing = simulation.add(prompt(20))
    simulation.launch()
    reader = simulation.add([*prompt(20), 1], n=2)
    simulation.launch()
    simulation.fail()
    assert all(sequence.is_finished for sequence in failing.sequences)
    assert all(sequence.num_in_flight_tokens == 0 for sequence in reader.sequences)
    assert list(simulation.scheduler.waiting) == reader.sequences
    assert simulation.scheduler.counters.num_voided_sequences == 2
    simulation.run()
    assert reader.sequences[0].num_output_tokens == 8
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()


def test_reader_of_a_reader_starts_again_too() -> None:
    simulation = caching(max_num_batched_tokens=20, depth=3)
    simulation.add(prompt(20))
    simulation.launch()
    first_reader = simulation.add(prompt(20) + prompt(16, salt=5))
    simulation.launch()
    second_reader = simulation.add(prompt(20) + prompt(16, salt=5) + [1])
    simulation.launch()
    table = second_reader.sequences[0].block_table
    assert table[5] == first_reader.sequences[0].block_table[5], "it reads what the first reader computes"
    simulation.fail()
    assert simulation.scheduler.counters.num_voided_sequences == 2
    simulation.run()
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()


def test_reader_that_was_preempted_meanwhile_loses_its_wrong_token() -> None:
    simulation = caching(max_num_batched_tokens=20)
    simulation.add(prompt(20))
    simulation.launch()
    reader = simulation.add([*prompt(20), 1]).sequences[0]
    simulation.launch()
    assert reader.num_in_flight_tokens == 1
    simulation.scheduler._preemption.preempt(reader)
    simulation.fail()
    assert reader.num_in_flight_tokens == 0
    simulation.run()
    simulation.assert_all_as_expected()


def test_reader_of_a_running_step_is_computed_again_rather_than_swapped() -> None:
    simulation = caching(max_num_batched_tokens=20, host_tier=HostTier(num_swap_blocks=50))
    first = simulation.add(prompt(20))
    simulation.launch()
    reader = simulation.add([*prompt(20), 1]).sequences[0]
    simulation.launch()
    assert not simulation.scheduler.tiers.can_swap_out(reader)
    assert simulation.scheduler.tiers.can_swap_out(first.sequences[0]), "its own step is no obstacle"
    simulation.complete()
    assert simulation.scheduler.tiers.can_swap_out(reader)
    simulation.run()
    simulation.assert_all_as_expected()


def test_latecomer_starts_from_its_siblings_prompt() -> None:
    simulation = caching(max_num_seqs=2)
    group = simulation.add(prompt(20), n=4)
    simulation.run()
    assert [sequence.num_cached_tokens for sequence in group.sequences] == [0, 0, 16, 16]
    simulation.assert_all_as_expected()


def test_preempted_sequence_finds_its_own_blocks_again() -> None:
    simulation = caching(num_blocks=14, block_size=4)
    for salt in range(3):
        simulation.add(prompt(8, salt=salt), max_tokens=30)
    installs = []
    while simulation.scheduler.has_unfinished:
        batch = simulation.launch()
        installs += batch.installs if batch else []
        simulation.complete_transfers()
        if simulation.device.queue:
            simulation.complete()
    again = [install for install in installs if install.sequence.num_preemptions]
    assert any(install.num_computed_tokens > 0 for install in again)
    simulation.assert_all_as_expected()


def test_look_up_of_a_long_prompt_does_not_hold_up_those_that_run() -> None:
    simulation = caching(num_blocks=700, block_size=1, max_num_batched_tokens=600)
    tokens = prompt(600)
    run_alone(simulation, tokens, max_tokens=2)
    simulation.add(prompt(5, salt=50), max_tokens=12)
    simulation.launch()
    simulation.complete()
    long = simulation.add([*tokens, 1], max_tokens=2).sequences[0]
    num_steps_waited = 0
    while long.slot is None:
        num_hashes = len(long.block_hashes)
        batch = simulation.launch()
        assert batch is not None and batch.rows
        assert len(long.block_hashes) - num_hashes < 320, "too much was hashed at once"
        num_steps_waited += 1
        simulation.complete()
    assert num_steps_waited == 3
    assert long.num_cached_tokens == 600
    simulation.run()
    simulation.assert_all_as_expected()


# -- the host tier's cached prefixes ---------------------------------------------------------------


def offloading(*, seconds_per_block: float = 0.0, num_cache_blocks: int = 64) -> Simulation:
    """A device of 16 blocks whose cold prefixes move to the host."""
    simulation = caching(
        num_blocks=17,
        block_size=4,
        max_num_batched_tokens=8,
        host_tier=HostTier(num_cache_blocks=num_cache_blocks),
    )
    simulation.scheduler.tiers._predictor = ConstantRates(seconds_per_block=seconds_per_block)
    return simulation


def test_evicted_prefix_comes_back_from_the_host() -> None:
    simulation = offloading()
    run_alone(simulation, prompt(32))
    for salt in range(1, 6):
        run_alone(simulation, prompt(32, salt=salt))
    counters = simulation.scheduler.counters
    assert counters.num_offloaded_blocks > 0
    assert simulation.host_tier.num_cached_blocks > 0
    group = run_alone(simulation, prompt(32))
    assert counters.num_fetched_blocks > 0
    assert group.sequences[0].num_cached_tokens == 28
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()


def test_host_gives_up_a_fetched_prefix_from_its_end() -> None:
    simulation = offloading()
    for salt in range(6):
        run_alone(simulation, prompt(32, salt=salt))
    group = run_alone(simulation, prompt(32))
    assert simulation.scheduler.counters.num_fetched_blocks > 2
    host = simulation.host_tier
    coldest_first = list(host._cached)
    found = [host.find(content_hash) for content_hash in group.sequences[0].block_hashes]
    places = [coldest_first.index(block) for block in found if block is not None]
    assert len(places) > 2 and places == sorted(places, reverse=True)


def test_prefix_is_computed_when_that_is_sooner_than_copying_it() -> None:
    simulation = offloading(seconds_per_block=1.0)
    for salt in range(6):
        run_alone(simulation, prompt(32, salt=salt))
    assert simulation.host_tier.num_cached_blocks > 0
    assert run_alone(simulation, prompt(32)).sequences[0].num_cached_tokens == 0
    assert simulation.scheduler.counters.num_fetched_blocks == 0
    simulation.assert_all_as_expected()


def test_failed_fetch_is_computed_instead() -> None:
    simulation = offloading()
    for salt in range(6):
        run_alone(simulation, prompt(32, salt=salt))
    group = simulation.add(prompt(32))
    while not any(simulation.scheduler.moved):
        simulation.launch()
    simulation.complete_transfers(fail=True)
    simulation.run()
    assert group.sequences[0].num_cached_tokens == 0
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()


def test_others_run_while_a_prefix_is_fetched() -> None:
    simulation = offloading()
    for salt in range(6):
        run_alone(simulation, prompt(32, salt=salt))
    fetching = simulation.add(prompt(32))
    other = simulation.add(prompt(6, salt=50), max_tokens=3)
    while not other.is_finished:
        simulation.launch()
        if simulation.device.queue:
            simulation.complete()
    assert fetching.sequences[0].transfer_id is not None
    assert fetching.sequences[0].num_output_tokens == 0
    simulation.run()
    simulation.assert_all_as_expected()


# -- pins ------------------------------------------------------------------------------------------


def test_pinned_prefix_outlives_what_would_evict_it() -> None:
    simulation = caching(num_blocks=17, block_size=4, max_pinned_blocks=5)
    run_alone(simulation, prompt(20), max_tokens=1)
    pin = simulation.scheduler.pin(prompt(20), None)
    assert (pin.num_tokens, simulation.scheduler.num_pinned_blocks) == (20, 5)
    for salt in range(1, 6):
        run_alone(simulation, prompt(36, salt=salt))
    assert run_alone(simulation, [*prompt(20), 1]).sequences[0].num_cached_tokens == 20
    simulation.scheduler.unpin(pin.pin_id)
    simulation.scheduler.check()
    simulation.assert_nothing_held()
    for salt in range(1, 6):
        run_alone(simulation, prompt(36, salt=salt))
    assert run_alone(simulation, [*prompt(20), 2]).sequences[0].num_cached_tokens == 0


def test_pins_stay_within_their_quota() -> None:
    simulation = caching(block_size=4, max_pinned_blocks=3)
    run_alone(simulation, prompt(20), max_tokens=1)
    run_alone(simulation, prompt(8, salt=1), max_tokens=1)
    assert simulation.scheduler.pin(prompt(8), None).num_tokens == 8
    assert simulation.scheduler.pin(prompt(8), None).num_tokens == 8, "the same blocks cost nothing"
    assert simulation.scheduler.pin(prompt(20), None).num_tokens == 12
    assert simulation.scheduler.pin(prompt(8, salt=1), None).num_tokens == 0
    assert simulation.scheduler.num_pinned_blocks == 3
    simulation.scheduler.check()


def test_prefix_that_is_not_computed_or_not_certain_is_not_pinned() -> None:
    simulation = caching(block_size=4, max_pinned_blocks=8)
    assert simulation.scheduler.pin(prompt(8), None).num_tokens == 0
    simulation.add(prompt(8))
    simulation.launch()
    assert simulation.scheduler.pin(prompt(8), None).num_tokens == 0
    simulation.complete()
    assert simulation.scheduler.pin(prompt(8), None).num_tokens == 8
