"""Groups of layers with windows: blocks come and go with them, and a prefix is found with what it needs."""

from __future__ import annotations

import pytest

from graphllm.cache.block_manager import BlockManager
from graphllm.cache.host_tier import HostTier
from graphllm.scheduler.tiers import ConstantRates
from graphllm.sequence import Sequence
from tests.scheduler.simulated_device import Simulation

SIZE, WINDOW = 4, 6


def prompt(length: int, *, salt: int = 0) -> list[int]:
    return [(7 * index + salt) % 90 for index in range(length)]


def windowed(windows: tuple[int | None, ...] = (None, WINDOW), **options: object) -> Simulation:
    return Simulation(windows=windows, block_size=SIZE, **options)  # type: ignore[arg-type]


def held(sequence: Sequence, group: int, num_groups: int = 2) -> list[bool]:
    """Of a group's columns, whether there is a block."""
    return [block != 0 for block in sequence.block_table[group::num_groups]]


def test_decoding_holds_the_window_and_the_blocks_at_its_ends() -> None:
    simulation = windowed()
    (sequence,) = simulation.add(prompt(5), max_tokens=60).sequences
    num_seen = 0
    while simulation.scheduler.has_unfinished:
        while len(simulation.device.queue) < simulation.depth and simulation.launch() is not None:
            pass
        simulation.complete()
        if sequence.block_table:
            assert all(held(sequence, 0)), "a layer without a window needs everything"
            assert sum(held(sequence, 1)) <= -(-WINDOW // SIZE) + 2
            num_seen += 1
    assert num_seen > 50
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()


def test_long_prompt_holds_no_more_than_its_window_and_a_step() -> None:
    simulation = windowed(max_num_batched_tokens=8, depth=1, num_blocks=64)
    (sequence,) = simulation.add(prompt(80), max_tokens=2).sequences
    most = 0
    while simulation.scheduler.has_unfinished:
        simulation.launch()
        most = max(most, sum(held(sequence, 1)))
        simulation.complete()
    assert most == (WINDOW + 8) // SIZE + 1
    simulation.assert_all_as_expected()


def test_windows_alone_generate_without_end_on_a_handful_of_blocks() -> None:
    simulation = windowed((WINDOW,), num_blocks=9, max_num_batched_tokens=8)
    simulation.add(prompt(30), max_tokens=200)
    simulation.run()
    assert simulation.scheduler.num_preemptions == 0
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()


def test_blocks_behind_a_window_wait_for_the_steps_in_flight() -> None:
    simulation = windowed((WINDOW,), max_num_batched_tokens=8)
    simulation.add(prompt(40), max_tokens=2)
    simulation.launch()
    simulation.complete()
    simulation.launch()
    simulation.launch()
    assert simulation.manager.num_pending_blocks > 0, "the step in flight may read them"
    simulation.complete()
    simulation.complete()
    simulation.run()
    simulation.assert_all_as_expected()


# -- prefixes --------------------------------------------------------------------------------------


def run_alone(simulation: Simulation, tokens: list[int], **options: int) -> int:
    """How many of the tokens were found."""
    group = simulation.add(tokens, **options)
    simulation.run()
    simulation.assert_all_as_expected()
    return group.sequences[0].num_cached_tokens


def test_next_turn_needs_nothing_from_behind_windows() -> None:
    simulation = windowed(enable_prefix_caching=True)
    first = simulation.add(prompt(20), max_tokens=20)
    simulation.run()
    conversation = list(first.sequences[0].token_ids)
    # As if pressure had taken all that lies behind windows.
    assert simulation.manager._passed
    manager = simulation.manager
    manager.release(manager.allocate(len(manager._free) + len(manager._passed)))
    assert not manager._passed and manager.num_cached_blocks
    assert run_alone(simulation, [*conversation, 1, 2], max_tokens=1) == 36


def test_prefix_without_its_windows_is_cut_to_where_they_are_whole() -> None:
    simulation = windowed(enable_prefix_caching=True)
    (sequence,) = simulation.add(prompt(20), max_tokens=20).sequences
    simulation.run()
    layout, manager = simulation.manager.layout, simulation.manager
    assert layout.first_column(36, WINDOW) == 7
    (windows,) = [manager.find(sequence.block_hashes[8] + b"\1")]
    assert windows is not None
    manager.withdraw(windows, sequence.block_hashes[8] + b"\1")
    # The 9th column is gone in one group: 32 tokens are left, and their window is there.
    assert run_alone(simulation, list(sequence.token_ids), max_tokens=1) == 32


def test_the_same_content_is_another_block_in_each_group() -> None:
    simulation = windowed((None, None), enable_prefix_caching=True)
    run_alone(simulation, prompt(12), max_tokens=1)
    (sequence,) = simulation.add(prompt(12), max_tokens=1).sequences
    simulation.launch()
    assert sequence.num_cached_tokens == 8
    assert len(set(sequence.block_table)) == len(sequence.block_table) == 6
    simulation.run()
    simulation.assert_all_as_expected()


def test_what_fell_behind_windows_is_given_up_before_what_a_next_turn_needs() -> None:
    manager = BlockManager(8, SIZE, windows=(WINDOW,))
    old, passed, found, other = manager.allocate(4)
    for number, block in enumerate((old, passed, found, other)):
        manager.publish(block, bytes([number]))
    manager.share((found,), found=True)
    manager.release((old,))
    manager.release((found, found, passed), passed=True)
    manager.check([[other]])
    assert manager.num_lossless_blocks == 4 and manager.coldest() == old
    assert manager.allocate(6)[-3:] == [passed, old, found]


def test_host_tier_keeps_and_returns_what_windows_show() -> None:
    simulation = windowed(
        enable_prefix_caching=True,
        num_blocks=41,
        max_num_batched_tokens=8,
        host_tier=HostTier(num_cache_blocks=200),
    )
    simulation.scheduler.tiers._predictor = ConstantRates()
    first = simulation.add(prompt(32), max_tokens=8)
    simulation.run()
    for salt in range(1, 9):
        run_alone(simulation, prompt(32, salt=salt), max_tokens=8)
    conversation = list(first.sequences[0].token_ids)
    assert run_alone(simulation, [*conversation, 1], max_tokens=2) == 36
    counters = simulation.scheduler.counters
    assert 0 < counters.num_fetched_blocks < 2 * 9, "not what lies behind the window"
    simulation.assert_nothing_held()


def test_swapped_sequence_takes_no_more_than_its_windows_along() -> None:
    simulation = windowed(num_blocks=33, host_tier=HostTier(num_swap_blocks=100))
    for salt in range(3):
        simulation.add(prompt(30, salt=salt), max_tokens=30)
    simulation.run()
    counters = simulation.scheduler.counters
    assert counters.num_swapped_in_blocks == counters.num_swapped_out_blocks > 0
    longest = simulation.manager.layout.num_needed(60, num_settled=58)
    assert counters.num_swapped_out_blocks <= counters.num_preemptions * longest
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()


@pytest.mark.parametrize("quota", [0, 8, 9, 30])
def test_pinned_prefix_keeps_its_windows_and_stays_within_the_quota(quota: int) -> None:
    simulation = windowed(enable_prefix_caching=True, num_blocks=41, max_pinned_blocks=quota)
    run_alone(simulation, prompt(28), max_tokens=1)
    pin = simulation.scheduler.pin(prompt(28), None)
    assert simulation.scheduler.num_pinned_blocks == len(pin.blocks) <= quota
    if quota == 30:  # seven columns of one group, two of the other
        assert (pin.num_tokens, len(pin.blocks)) == (28, 9)
        for salt in range(1, 6):
            run_alone(simulation, prompt(36, salt=salt))
        assert run_alone(simulation, [*prompt(28), 5], max_tokens=1) == 28
    assert (pin.num_tokens > 0) == (quota > 0)
    simulation.scheduler.unpin(pin.pin_id)
    simulation.scheduler.check()
