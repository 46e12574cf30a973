"""Random holders, contents and steps: every block is in one place, and every content where it was left."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from graphllm.cache.block_manager import BlockManager

NUM_BLOCKS = 24


class BlockManagerMachine(RuleBasedStateMachine):
    """The model: everybody's tables, and what was last written into each block."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(NUM_BLOCKS, 16)
        self.tables: list[list[int]] = []
        self.content_of: dict[int, bytes] = {}
        self.next_content = 0
        self.launched = 0
        self.completed = 0

    def draw_table(self, data: st.DataObject) -> list[int]:
        return data.draw(st.sampled_from(self.tables))

    @rule(count=st.integers(1, 6))
    def allocate(self, count: int) -> None:
        """A new owner writes: what these blocks had before is no more."""
        if count > self.manager.num_free_blocks:
            return
        num_lost = max(0, count - self.manager.num_lossless_blocks)
        coldest = self.manager.coldest()
        table = self.manager.allocate(count)
        assert (coldest in table) == (num_lost > 0), "a content was given up before it had to be"
        for block in table:
            assert self.manager.hash_of(block) is None, "an allocated block still has a name"
            self.content_of.pop(block, None)
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def share_a_prefix(self, data: st.DataObject) -> None:
        table = self.draw_table(data)
        prefix = table[: data.draw(st.integers(1, len(table)))]
        self.manager.share(prefix)
        self.tables.append(list(prefix))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.draw_table(data)))
        content = b"%d" % self.next_content
        self.next_content += 1
        if self.manager.publish(block, content):
            assert block not in self.content_of
            self.content_of[block] = content
        else:
            assert block in self.content_of, "a block without a name could not be published"

    @precondition(lambda self: self.content_of)
    @rule(data=st.data())
    def find_and_hold(self, data: st.DataObject) -> None:
        """A hit, wherever the block is."""
        block = data.draw(st.sampled_from(sorted(self.content_of)))
        found = self.manager.find(self.content_of[block])
        assert found == block, "a content was lost without a block being allocated"
        self.manager.share([block])
        self.tables.append([block])

    @precondition(lambda self: self.content_of)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.content_of)))
        self.manager.withdraw(block, self.content_of.pop(block))

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), backed=st.booleans())
    def release(self, data: st.DataObject, backed: bool) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.manager.release(reversed(self.tables.pop(index)), backed=backed)

    @precondition(lambda self: self.manager.coldest() is not None)
    @rule()
    def back_the_coldest(self) -> None:
        coldest = self.manager.coldest()
        assert coldest is not None
        self.manager.mark_backed(coldest)

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
        touched = set(self.manager.touched)
        self.manager.check_touched(self.tables)
        self.manager.touched = touched
        self.manager.check(self.tables)
        if self.launched == self.completed:
            assert self.manager.num_pending_blocks == 0

    @invariant()
    def every_content_is_where_it_was_written(self) -> None:
        for block, content in self.content_of.items():
            assert self.manager.hash_of(block) == content


TestBlockManagerMachine = BlockManagerMachine.TestCase
TestBlockManagerMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
