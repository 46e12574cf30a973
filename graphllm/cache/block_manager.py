"""Who owns which KV block of the device, and which cached content lies where.

Owns the free list, the reference counts, the fence behind which released blocks wait until no step in
flight can touch them, and the index of full blocks by the hash of their content. Holds no tensors and
knows no sequences: callers keep block tables, compute hashes and say when a content is certain.

Every block is at any time in exactly one place: free, cached (nobody holds it, its content may be used
again), pending (released, but a launched step may still read or write it), or held by as many holders
as its reference count says. Block 0 belongs to nobody: it is the padding of block tables and is never
written.

Cached blocks are given up in the order in which they were released. A block's holders hold all blocks
before it and release the last one first, so leaves go before roots. Those that have a copy in the host
tier ("backed") go first of all, as nothing is lost with them. Everything here is O(1) for each block.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

NULL_BLOCK = 0


class BlockManager:
    """A pool of `num_blocks` blocks of `block_size` tokens, block 0 excluded from use."""

    __slots__ = (
        "_backed",
        "_block_of",
        "_cached",
        "_completed_step",
        "_fence",
        "_free",
        "_hash_of",
        "_launched_step",
        "_pending",
        "_reference_counts",
        "block_size",
        "num_blocks",
        "num_evicted_blocks",
        "touched",
    )

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 2, "one block is reserved"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_evicted_blocks = 0  # contents that were dropped from the cache to make room
        self.touched: set[int] = set()  # since the last check, when somebody checks
        self._free: deque[int] = deque(range(1, num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._backed: OrderedDict[int, None] = OrderedDict()
        # block: (step that must complete, whether it is backed); the steps never decrease
        self._pending: OrderedDict[int, tuple[int, bool]] = OrderedDict()
        self._reference_counts = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._launched_step = 0
        self._completed_step = 0
        self._fence = 0

    @property
    def num_usable_blocks(self) -> int:
        return self.num_blocks - 1

    @property
    def num_free_blocks(self) -> int:
        """Blocks that `allocate` can give now: free ones, and cached ones that it would give up."""
        return len(self._free) + len(self._cached) + len(self._backed)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that nobody holds and whose content is kept."""
        return len(self._cached) + len(self._backed)

    @property
    def num_lossless_blocks(self) -> int:
        """Blocks that `allocate` can give now without a content being lost."""
        return len(self._free) + len(self._backed)

    @property
    def num_pending_blocks(self) -> int:
        """Released blocks that become free or cached when the steps in flight complete."""
        return len(self._pending)

    @property
    def num_held_blocks(self) -> int:
        return self.num_usable_blocks - self.num_free_blocks - len(self._pending)

    @property
    def launched_step(self) -> int:
        """The newest step that was launched."""
        return self._launched_step

    @property
    def completed_step(self) -> int:
        """The newest step that has ended."""
        return self._completed_step

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    # -- holders ----------------------------------------------------------------------------------

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each with one holder. The caller has checked that they exist."""
        assert count <= self.num_free_blocks, "allocation without a check"
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.popleft()
            else:
                block, _ = (self._backed or self._cached).popitem(last=False)
                self._forget(block)
                self.num_evicted_blocks += 1
            self._reference_counts[block] = 1
            blocks.append(block)
        self.touched.update(blocks)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add a holder to each of `blocks`; cached content may be held again, with or without a fence."""
        for block in blocks:
            if self._reference_counts[block] == 0:
                assert self._hash_of[block] is not None, "sharing a block that nobody holds"
                for idle in (self._pending, self._cached, self._backed):
                    if block in idle:
                        del idle[block]
                        break
            self._reference_counts[block] += 1
            self.touched.add(block)

    def reference_count(self, block: int) -> int:
        return self._reference_counts[block]

    def release(self, blocks: Iterable[int], *, backed: bool = False) -> None:
        """Give up one hold on each block, first to be reused first; the last holder's wait behind the fence.

        `backed` says that the host tier has the same content.
        """
        for block in blocks:
            self.touched.add(block)
            self._reference_counts[block] -= 1
            assert self._reference_counts[block] >= 0, "released more often than held"
            if self._reference_counts[block] == 0:
                if self._fence > self._completed_step:
                    self._pending[block] = (self._fence, backed)
                else:
                    self._make_idle(block, backed=backed)

    def _make_idle(self, block: int, *, backed: bool) -> None:
        if self._hash_of[block] is None:
            self._free.append(block)
        elif backed:
            self._backed[block] = None
        else:
            self._cached[block] = None

    # -- steps ------------------------------------------------------------------------------------

    def fence_next_step(self, step_id: int) -> None:
        """Releases wait for the step that is being scheduled: it is going to read such a block."""
        self._fence = step_id

    def step_launched(self, step_id: int) -> None:
        """From now on, releases wait for `step_id`. Steps are launched and completed in order."""
        assert step_id > self._launched_step, "steps are launched in order"
        self._launched_step = self._fence = step_id

    def step_completed(self, step_id: int) -> None:
        """Free what waited for `step_id` or an earlier step."""
        assert self._completed_step < step_id <= self._launched_step, "steps complete in order"
        self._completed_step = step_id
        while self._pending:
            block, (fence, backed) = next(iter(self._pending.items()))
            if fence > step_id:
                break
            del self._pending[block]
            self._make_idle(block, backed=backed)
            self.touched.add(block)

    # -- cached content ---------------------------------------------------------------------------

    def publish(self, block: int, content_hash: bytes) -> bool:
        """Let others find a held block's content. False when it is published already, here or elsewhere."""
        assert self._reference_counts[block] > 0, "publishing a block that nobody holds"
        if content_hash in self._block_of or self._hash_of[block] is not None:
            return False
        self._block_of[content_hash] = block
        self._hash_of[block] = content_hash
        self.touched.add(block)
        return True

    def withdraw(self, block: int, content_hash: bytes) -> None:
        """The content was never computed: nobody finds it any more. Its holders keep the block."""
        if self._block_of.get(content_hash) != block:
            return
        self._forget(block)
        self.touched.add(block)
        if block in self._cached or block in self._backed:
            self._cached.pop(block, None)
            self._backed.pop(block, None)
            self._free.append(block)

    def _forget(self, block: int) -> None:
        content_hash = self._hash_of[block]
        assert content_hash is not None, "an unpublished block is cached"
        del self._block_of[content_hash]
        self._hash_of[block] = None

    def find(self, content_hash: bytes) -> int | None:
        """The block with this content, held by anybody or nobody."""
        return self._block_of.get(content_hash)

    def hash_of(self, block: int) -> bytes | None:
        return self._hash_of[block]

    def coldest(self) -> int | None:
        """The cached block without a copy in the host tier that would be given up first."""
        return next(iter(self._cached), None)

    def mark_backed(self, block: int) -> None:
        """The host tier has this cached block's content."""
        del self._cached[block]
        self._backed[block] = None

    # -- checking ---------------------------------------------------------------------------------

    def check(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Prove the invariants against all holders' block tables. Raises AssertionError."""
        holders = [0] * self.num_blocks
        for table in block_tables:
            assert len(set(table)) == len(table), "a block table names a block twice"
            for block in table:
                holders[block] += 1
        assert holders[NULL_BLOCK] == 0, "somebody holds the null block"
        assert holders == self._reference_counts, "reference counts differ from the holders"
        idle = [*self._free, *self._pending, *self._cached, *self._backed]
        assert len(set(idle)) == len(idle), "a block is idle twice"
        assert NULL_BLOCK not in idle, "the null block is in use"
        assert all(self._reference_counts[block] == 0 for block in idle), "an idle block is held"
        held = sum(1 for count in self._reference_counts if count > 0)
        assert len(idle) + held == self.num_usable_blocks, "a block was lost"
        for block in range(self.num_blocks):
            self._check_content(block)
        assert len(self._block_of) == sum(content is not None for content in self._hash_of)
        fences = [fence for fence, _ in self._pending.values()]
        assert fences == sorted(fences), "fences open out of order"
        self.touched.clear()

    def check_touched(self, block_tables: Iterable[Sequence[int]]) -> None:
        """As `check`, for the blocks that changed since the last one. Raises AssertionError."""
        touched = self.touched
        if not touched:
            return
        holders = dict.fromkeys(touched, 0)
        for table in block_tables:
            for block in touched.intersection(table):
                holders[block] += 1
        for block, count in holders.items():
            assert count == self._reference_counts[block], "reference counts differ from the holders"
            self._check_content(block)
            places = (block in self._pending) + (block in self._cached) + (block in self._backed)
            assert places <= (count == 0), "a block is in two places"
        num_held = sum(map(bool, self._reference_counts))
        assert num_held == self.num_held_blocks, "a block was lost"
        self.touched = set()

    def _check_content(self, block: int) -> None:
        content_hash = self._hash_of[block]
        if content_hash is not None:
            assert self._block_of.get(content_hash) == block, "two blocks answer to one hash"
        else:
            assert block not in self._cached and block not in self._backed, "a cached block has no hash"
