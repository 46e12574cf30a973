"""Who owns which KV block.

Owns the free list, the reference counts and the fence behind which released blocks wait until no
step in flight can touch them. Holds no tensors and knows no sequences: callers keep block tables.

Every block is at any time in exactly one place: free, pending (released, but a launched step may
still read or write it), or held by as many holders as its reference count says. Block 0 belongs to
nobody: it is the padding of block tables and is never written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

NULL_BLOCK = 0


class BlockManager:
    """A pool of `num_blocks` blocks of `block_size` tokens, block 0 excluded from use."""

    __slots__ = (
        "_completed_step",
        "_free",
        "_launched_step",
        "_pending",
        "_reference_counts",
        "block_size",
        "num_blocks",
    )

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 2, "one block is reserved"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: deque[int] = deque(range(1, num_blocks))
        self._pending: deque[tuple[int, int]] = deque()  # (step that must complete, block)
        self._reference_counts = [0] * num_blocks
        self._launched_step = 0
        self._completed_step = 0

    @property
    def num_usable_blocks(self) -> int:
        return self.num_blocks - 1

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def num_pending_blocks(self) -> int:
        """Released blocks that become free when the steps in flight complete."""
        return len(self._pending)

    @property
    def num_held_blocks(self) -> int:
        return self.num_usable_blocks - len(self._free) - len(self._pending)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each with one holder. The caller has checked that they exist."""
        assert count <= len(self._free), "allocation without a check"
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._reference_counts[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add a holder to each of `blocks`."""
        for block in blocks:
            assert self._reference_counts[block] > 0, "sharing a block that nobody holds"
            self._reference_counts[block] += 1

    def reference_count(self, block: int) -> int:
        return self._reference_counts[block]

    def release(self, blocks: Iterable[int]) -> None:
        """Give up one hold on each block; the last holder's blocks wait behind the fence."""
        in_flight = self._launched_step > self._completed_step
        for block in blocks:
            self._reference_counts[block] -= 1
            assert self._reference_counts[block] >= 0, "released more often than held"
            if self._reference_counts[block] == 0:
                if in_flight:
                    self._pending.append((self._launched_step, block))
                else:
                    self._free.append(block)

    def step_launched(self, step_id: int) -> None:
        """From now on, releases wait for `step_id`. Steps are launched and completed in order."""
        assert step_id > self._launched_step, "steps are launched in order"
        self._launched_step = step_id

    def step_completed(self, step_id: int) -> None:
        """Free what waited for `step_id` or an earlier step."""
        assert self._completed_step < step_id <= self._launched_step, "steps complete in order"
        self._completed_step = step_id
        while self._pending and self._pending[0][0] <= step_id:
            self._free.append(self._pending.popleft()[1])

    def check(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Prove the invariants against all holders' block tables. Raises AssertionError."""
        holders = [0] * self.num_blocks
        for table in block_tables:
            assert len(set(table)) == len(table), "a block table names a block twice"
            for block in table:
                holders[block] += 1
        assert holders[NULL_BLOCK] == 0, "somebody holds the null block"
        assert holders == self._reference_counts, "reference counts differ from the holders"
        idle = [*self._free, *(block for _, block in self._pending)]
        assert len(set(idle)) == len(idle), "a block is idle twice"
        assert NULL_BLOCK not in idle, "the null block is in use"
        assert all(self._reference_counts[block] == 0 for block in idle), "an idle block is held"
        held = sum(1 for count in self._reference_counts if count > 0)
        assert len(idle) + held == self.num_usable_blocks, "a block was lost"
