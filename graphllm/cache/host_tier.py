"""Who owns which KV block of host memory: swapped sequences, and cold cached prefixes.

Owns numbers, reference counts and the index of cached content; the memory itself is the swapper's. Two
budgets over one pool, so that neither use can starve the other: blocks of swapped sequences are held
until they are back or given up, cached ones give way to warmer ones, the coldest first.

Every block is free, cached (held by nobody), or held by as many holders as its reference count says.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class HostTier:
    """`num_swap_blocks` for swapped sequences and `num_cache_blocks` for cached prefixes."""

    __slots__ = (
        "_block_of",
        "_cached",
        "_free",
        "_hash_of",
        "_num_cache_in_use",
        "_reference_counts",
        "_swap_blocks",
        "num_cache_blocks",
        "num_swap_blocks",
    )

    def __init__(self, *, num_swap_blocks: int = 0, num_cache_blocks: int = 0) -> None:
        self.num_swap_blocks = num_swap_blocks
        self.num_cache_blocks = num_cache_blocks
        self._free = list(range(self.num_blocks))
        self._reference_counts = [0] * self.num_blocks
        self._swap_blocks: set[int] = set()
        self._num_cache_in_use = 0
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # held by nobody, coldest first

    @property
    def num_blocks(self) -> int:
        return self.num_swap_blocks + self.num_cache_blocks

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        """Cached blocks that nobody holds."""
        return len(self._cached)

    @property
    def num_held_blocks(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_free_swap_blocks(self) -> int:
        return self.num_swap_blocks - len(self._swap_blocks)

    def allocate_swap(self, count: int) -> list[int]:
        """`count` blocks for a swapped sequence, one hold on each. The caller has checked for room."""
        assert count <= self.num_free_swap_blocks, "allocation without a check"
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._reference_counts[block] = 1
        self._swap_blocks.update(blocks)
        return blocks

    def allocate_cache(self) -> int | None:
        """A block for cached content, one hold on it; the coldest content goes. None when all are held."""
        if self._num_cache_in_use >= self.num_cache_blocks:
            if not self._cached:
                return None
            self._drop(self._cached.popitem(last=False)[0])
        block = self._free.pop()
        self._num_cache_in_use += 1
        self._reference_counts[block] = 1
        return block

    def publish(self, block: int, content_hash: bytes) -> None:
        """A cache block's content has arrived: let it be found."""
        assert block not in self._swap_blocks, "a swapped block is its sequence's alone"
        if content_hash not in self._block_of:
            self._block_of[content_hash] = block
            self._hash_of[block] = content_hash

    def find(self, content_hash: bytes) -> int | None:
        """The cached block with this content."""
        return self._block_of.get(content_hash)

    def share(self, blocks: Iterable[int]) -> None:
        """Add a holder to each block; a cached one cannot be dropped meanwhile."""
        for block in blocks:
            if self._reference_counts[block] == 0:
                del self._cached[block]
            self._reference_counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Give up one hold on each block; cached content stays, as the warmest."""
        for block in blocks:
            self._reference_counts[block] -= 1
            assert self._reference_counts[block] >= 0, "released more often than held"
            if self._reference_counts[block]:
                continue
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._drop(block)

    def _drop(self, block: int) -> None:
        content_hash = self._hash_of.pop(block, None)
        if content_hash is not None:
            del self._block_of[content_hash]
        if block in self._swap_blocks:
            self._swap_blocks.discard(block)
        else:
            self._num_cache_in_use -= 1
        self._free.append(block)

    def check(self, holders: Iterable[Iterable[int]]) -> None:
        """Prove the invariants against everyone's holds. Raises AssertionError."""
        counts = [0] * self.num_blocks
        for blocks in holders:
            for block in blocks:
                counts[block] += 1
        assert counts == self._reference_counts, "host reference counts differ from the holders"
        idle = [*self._free, *self._cached]
        assert len(set(idle)) == len(idle), "a host block is idle twice"
        assert all(counts[block] == 0 for block in idle), "an idle host block is held"
        num_held = sum(1 for count in counts if count)
        assert len(idle) + num_held == self.num_blocks, "a host block was lost"
        assert len(self._swap_blocks) <= self.num_swap_blocks
        assert self._num_cache_in_use <= self.num_cache_blocks
        assert len(self._free) + len(self._swap_blocks) + self._num_cache_in_use == self.num_blocks
        assert all(block in self._hash_of for block in self._cached), "a cached host block has no hash"
        assert {self._block_of[content] for content in self._hash_of.values()} == set(self._hash_of)
        assert len(self._block_of) == len(self._hash_of)
