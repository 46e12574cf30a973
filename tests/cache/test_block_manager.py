"""The block manager keeps every block in exactly one place."""

from __future__ import annotations

import pytest

from graphllm.cache.block_manager import NULL_BLOCK, BlockManager


def test_null_block_is_never_given_out() -> None:
    manager = BlockManager(8, 16)
    assert NULL_BLOCK not in manager.allocate(manager.num_free_blocks)


def test_tokens_round_up_to_blocks() -> None:
    manager = BlockManager(8, 16)
    assert [manager.layout.num_columns(count) for count in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_shared_block_is_freed_by_its_last_holder() -> None:
    manager = BlockManager(8, 16)
    table = manager.allocate(2)
    manager.share(table[:1])
    manager.release(table)
    assert (manager.num_held_blocks, manager.num_free_blocks) == (1, 6)
    manager.release(table[:1])
    assert manager.num_held_blocks == 0


def test_released_block_waits_for_the_step_in_flight() -> None:
    manager = BlockManager(4, 16)
    table = manager.allocate(3)
    manager.step_launched(1)
    manager.step_launched(2)
    manager.release(table)
    assert (manager.num_free_blocks, manager.num_pending_blocks) == (0, 3)
    manager.step_completed(1)
    assert manager.num_free_blocks == 0, "step 2 may still write to them"
    manager.step_completed(2)
    assert (manager.num_free_blocks, manager.num_pending_blocks) == (3, 0)


def test_releasing_twice_is_caught() -> None:
    manager = BlockManager(4, 16)
    table = manager.allocate(1)
    manager.release(table)
    with pytest.raises(AssertionError, match="more often than held"):
        manager.release(table)


@pytest.mark.parametrize("damage", ["lost", "leaked", "double"])
def test_check_notices_damage(damage: str) -> None:
    manager = BlockManager(4, 16)
    table = manager.allocate(2)
    manager.check([table])
    if damage == "lost":
        manager._free.popleft()
        holders = [table]
    elif damage == "leaked":
        holders = [table[:1]]
    else:
        holders = [table, table]
    with pytest.raises(AssertionError):
        manager.check(holders)
