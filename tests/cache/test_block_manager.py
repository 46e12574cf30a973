"""The block manager keeps every block in exactly one place."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from graphllm.cache.block_manager import NULL_BLOCK, BlockManager


def test_null_block_is_never_given_out() -> None:
    manager = BlockManager(8, 16)
    assert NULL_BLOCK not in manager.allocate(manager.num_free_blocks)


def test_tokens_round_up_to_blocks() -> None:
    manager = BlockManager(8, 16)
    assert [manager.num_blocks_for(count) for count in (0, 1, 16, 17)] == [0, 1, 1, 2]


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


class BlockManagerMachine(RuleBasedStateMachine):
    """Random holders, shares, releases and steps; the checker after each."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(24, 16)
        self.tables: list[list[int]] = []
        self.launched = 0
        self.completed = 0

    @rule(count=st.integers(1, 6))
    def allocate(self, count: int) -> None:
        if count <= self.manager.num_free_blocks:
            self.tables.append(self.manager.allocate(count))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def share_a_prefix(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        prefix = table[: data.draw(st.integers(1, len(table)))]
        self.manager.share(prefix)
        self.tables.append(list(prefix))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.manager.release(self.tables.pop(index))

    @precondition(lambda self: self.launched - self.completed < 2)
    @rule()
    def launch(self) -> None:
        self.launched += 1
        self.manager.step_launched(self.launched)

    @precondition(lambda self: self.launched > self.completed)
    @rule()
    def complete(self) -> None:
        self.completed += 1
        self.manager.step_completed(self.completed)

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        self.manager.check(self.tables)
        if self.launched == self.completed:
            assert self.manager.num_pending_blocks == 0


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
