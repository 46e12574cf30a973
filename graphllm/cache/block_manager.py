"""Who owns which KV block of the device, and which cached content lies where.

Owns the free list, the reference counts, the fence behind which released blocks wait until no step in
flight can touch them, and the index of full blocks by the hash of their content. Holds no tensors and
knows no sequences: callers keep block tables, compute hashes and say when a content is certain.

Every block is at any time in exactly one place: free, cached (nobody holds it, its content may be used
again), pending (released, but a launched step may still read or write it), or held by as many holders
as its reference count says. Block 0 belongs to nobody: it is the padding of block tables and is never
written. Block tables name it where they have no block, so it may be shared and released like others.

Cached blocks are given up in the order in which they were released. A block's holders hold all blocks
before it and release the last one first, so leaves go before roots. Blocks that were released because they
lay behind a window ("passed") go first of all, unless they have been found before: a request that goes on
from where their holder ends has no use for them, and a long answer would otherwise drive out what others
need. Then go those that have a copy in the host tier ("backed"), as nothing is lost with them. Everything
here is O(1) for each block.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

from graphllm.cache.block_layout import BlockLayout

NULL_BLOCK = 0


class BlockManager:
    """A pool of `num_blocks` blocks of `block_size` tokens, block 0 excluded from use.

    windows: of the groups of layers that share the pool, see `BlockLayout`.
    """

    __slots__ = (
        "_backed",
        "_block_of",
        "_cached",
        "_completed_step",
        "_fence",
        "_found",
        "_free",
        "_hash_of",
        "_launched_step",
        "_passed",
        "_pending",
        "_reference_counts",
        "block_size",
        "layout",
        "num_blocks",
        "num_evicted_blocks",
        "num_passed_blocks",
        "touched",
    )

    def __init__(
        self, num_blocks: int, block_size: int, *, windows: tuple[int | None, ...] = (None,)
    ) -> None:
        assert num_blocks >= 2, "one block is reserved"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.layout = BlockLayout(block_size, windows)
        self.num_evicted_blocks = 0  # contents that were dropped from the cache to make room
        self.num_passed_blocks = 0  # blocks that were released because they lay behind a window
        self.touched: set[int] = set()  # since the last check, when somebody checks
        self._free: deque[int] = deque(range(1, num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._backed: OrderedDict[int, None] = OrderedDict()
        self._passed: OrderedDict[int, None] = OrderedDict()
        self._found: set[int] = set()  # whose content was found by a look-up
        # block: (step that must complete, where it goes if it has content); the steps never decrease
        self._pending: OrderedDict[int, tuple[int, OrderedDict[int, None]]] = OrderedDict()
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
        return len(self._free) + self.num_cached_blocks

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that nobody holds and whose content is kept."""
        return len(self._cached) + len(self._backed) + len(self._passed)

    @property
    def num_lossless_blocks(self) -> int:
        """Blocks that `allocate` can give now without a content being lost that anybody may want."""
        return len(self._free) + len(self._backed) + len(self._passed)

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

    # -- holders ----------------------------------------------------------------------------------

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each with one holder. The caller has checked that they exist."""
        assert count <= self.num_free_blocks, "allocation without a check"
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.popleft()
            else:
                block, _ = (self._passed or self._backed or self._cached).popitem(last=False)
                self._forget(block)
                self.num_evicted_blocks += 1
            self._reference_counts[block] = 1
            blocks.append(block)
        self.touched.update(blocks)
        return blocks

    def share(self, blocks: Iterable[int], *, found: bool = False) -> None:
        """Add a holder to each of `blocks`; cached content may be held again, with or without a fence.

        found: by a look-up, for another sequence than the one that computed it.
        """
        for block in filter(None, blocks):
            if self._reference_counts[block] == 0:
                assert self._hash_of[block] is not None, "sharing a block that nobody holds"
                for idle in (self._pending, self._cached, self._backed, self._passed):
                    if block in idle:
                        del idle[block]
                        break
            if found:
                self._found.add(block)
            self._reference_counts[block] += 1
            self.touched.add(block)

    def reference_count(self, block: int) -> int:
        return self._reference_counts[block]

    def release(self, blocks: Iterable[int], *, backed: bool = False, passed: bool = False) -> None:
        """Give up one hold on each block, first to be reused first; the last holder's wait behind the fence.

        `backed` says that the host tier has the same content; `passed`, that the blocks lie behind a window
        of their holder, which goes on.
        """
        for block in filter(None, blocks):
            self.num_passed_blocks += passed
            self.touched.add(block)
            self._reference_counts[block] -= 1
            assert self._reference_counts[block] >= 0, "released more often than held"
            if self._reference_counts[block] == 0:
                idle = self._backed if backed else self._cached
                if passed and block not in self._found:
                    idle = self._passed
                if self._fence > self._completed_step:
                    self._pending[block] = (self._fence, idle)
                else:
                    self._make_idle(block, idle)

    def _make_idle(self, block: int, idle: OrderedDict[int, None]) -> None:
        if self._hash_of[block] is None:
            self._free.append(block)
        else:
            idle[block] = None

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
            block, (fence, idle) = next(iter(self._pending.items()))
            if fence > step_id:
                break
            del self._pending[block]
            self._make_idle(block, idle)
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
        for idle in (self._cached, self._backed, self._passed):
            if block in idle:
                del idle[block]
                self._free.append(block)

    def _forget(self, block: int) -> None:
        content_hash = self._hash_of[block]
        assert content_hash is not None, "an unpublished block is cached"
        del self._block_of[content_hash]
        self._hash_of[block] = None
        self._found.discard(block)

    def find(self, content_hash: bytes) -> int | None:
        """The block with this content, held by anybody or nobody."""
        return self._block_of.get(content_hash)

    def find_leading(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks with these contents, up to the first that is not there."""
        blocks = []
        find = self._block_of.get
        for key in keys:
            block = find(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

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
            blocks = list(filter(None, table))
            assert len(set(blocks)) == len(blocks), "a block table names a block twice"
            for block in blocks:
                holders[block] += 1
        assert holders == self._reference_counts, "reference counts differ from the holders"
        idle = [*self._free, *self._pending, *self._cached, *self._backed, *self._passed]
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
            places = (block in self._pending) + (block in self._passed)
            places += (block in self._cached) + (block in self._backed)
            assert places <= (count == 0), "a block is in two places"
        num_held = sum(map(bool, self._reference_counts))
        assert num_held == self.num_held_blocks, "a block was lost"
        self.touched = set()

    def _check_content(self, block: int) -> None:
        content_hash = self._hash_of[block]
        if content_hash is not None:
            assert self._block_of.get(content_hash) == block, "two blocks answer to one hash"
        else:
            is_cached = block in self._cached or block in self._backed or block in self._passed
            assert not is_cached, "a cached block has no hash"
            assert block not in self._found, "a content was found that is none"
