"""Which blocks of a prompt exist already, and which of those are certain.

Owns the look-up of prefixes, the publication of full blocks, what is known about publications whose
step has not ended, and pinned prefixes. Blocks are the block manager's, sequences the scheduler's.

A prompt block is published when its step is launched: later steps run behind it and may read it. Until
the step has ended well the content is unconfirmed, and nobody but such a step may use it (no swap, no
copy to the host). When the step fails its publications are withdrawn, and whoever read them, directly
or through others, has computed nothing. Generated blocks are published when their tokens are known.

Where layers have windows, a prefix exists if every group that sees everything has all its columns, and every
windowed group those that the token behind the prefix sees: what lies before may be gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from graphllm.cache.block_manager import NULL_BLOCK, BlockManager
from graphllm.cache.host_tier import HostTier
from graphllm.cache.prefix_hash import PrefixHasher, content_key
from graphllm.sequence import Sequence

_NUM_HASHES_AT_ONCE = 32

_Find = Callable[[bytes], int | None]


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """How much of a sequence exists: as block tables of leading full columns, 0 where no block is needed.

    device_table: of the longest prefix that is on the device. fetched_table: of a longer one, part of which
    is on the host, or the same; host_blocks: (entry in it, host block) of that part, whose entries are 0.
    """

    device_table: list[int]
    fetched_table: list[int]
    host_blocks: list[tuple[int, int]]


NO_HIT = PrefixHit([], [], [])


@dataclass(frozen=True, slots=True)
class PinnedPrefix:
    """A prefix of `num_tokens` tokens whose blocks are kept until `Scheduler.unpin(pin_id)`."""

    pin_id: int
    num_tokens: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Publication:
    sequence: Sequence
    block: int
    key: bytes


def _keys(hashes: list[bytes], group: int) -> list[bytes]:
    """What a group's blocks of these columns are called."""
    return [content_key(content_hash, group) for content_hash in hashes] if group else hashes


class PrefixSharing:
    """The prefix cache's policy over one block manager; at most `max_pinned_blocks` stay pinned."""

    def __init__(self, manager: BlockManager, hasher: PrefixHasher, *, max_pinned_blocks: int) -> None:
        self._manager = manager
        self._layout = manager.layout
        self._hasher = hasher
        self._max_pinned_blocks = max_pinned_blocks
        self._publications: dict[int, list[_Publication]] = {}  # by step
        self._unconfirmed: dict[int, tuple[int, Sequence]] = {}  # block: its step and publisher
        self._readers: dict[int, list[Sequence]] = {}  # by step, those that started from its blocks
        self._pins: dict[int, PinnedPrefix] = {}
        self._next_pin_id = 1

    # -- looking up -------------------------------------------------------------------------------

    def hash_columns(self, sequence: Sequence, num_columns: int) -> None:
        """Make sure that the hashes of the first `num_columns` columns are known."""
        self._hasher.extend(
            sequence.block_hashes,
            sequence.token_ids,
            num_blocks=num_columns,
            cache_salt=sequence.group.cache_salt,
            adapter_load=sequence.group.adapter_load,
        )

    def look_up(self, sequence: Sequence, host: HostTier, *, max_new_hashes: int | None) -> PrefixHit | None:
        """The longest prefix that exists, always without the column of the last token.

        None when `max_new_hashes` were not enough to tell; the next look-up goes on from there.
        """
        if sequence.group.skips_prefix_lookup:
            return NO_HIT
        end = (len(sequence.token_ids) - 1) // self._hasher.block_size
        hashes, find = sequence.block_hashes, self._manager.find
        may_hash = end if max_new_hashes is None else len(hashes) + max_new_hashes
        runs = self._leading_blocks(sequence, end, may_hash=may_hash)
        if runs is None:
            return None
        num_full = min(map(len, runs)) if runs else end
        num_columns = self._count_all(hashes, num_full, find=find)
        table = self._table(hashes, num_columns, runs=runs)
        if host.num_cache_blocks == 0:
            return PrefixHit(table, table, [])

        def find_anywhere(key: bytes) -> int | None:
            block = find(key)
            return host.find(key) if block is None else block

        num_reached = self._count_full(sequence, num_full, end, find=find_anywhere, may_hash=may_hash)
        if num_reached is None:
            return None
        num_fetched = self._count_all(hashes, num_reached, find=find_anywhere)
        if num_fetched == num_columns:
            return PrefixHit(table, table, [])
        return self._with_host_blocks(hashes, num_fetched, device_table=table, host=host)

    def _leading_blocks(self, sequence: Sequence, end: int, *, may_hash: int) -> list[list[int]] | None:
        """Of each group that needs all columns, the blocks of the leading ones, up to column `end`.

        None when so many columns would have to be hashed that `may_hash` is passed.
        """
        hashes = sequence.block_hashes
        runs: list[list[int]] = [[] for _ in self._layout.full_groups]
        while True:
            known = min(end, len(hashes))
            for group, run in zip(self._layout.full_groups, runs, strict=True):
                run += self._manager.find_leading(_keys(hashes[len(run) : known], group))
            if known == end or any(len(run) < known for run in runs):
                return runs
            if known >= may_hash:
                return None
            self.hash_columns(sequence, min(end, known + _NUM_HASHES_AT_ONCE))

    def _count_full(
        self, sequence: Sequence, start: int, end: int, *, find: _Find, may_hash: int
    ) -> int | None:
        """The first column from `start` on that a group lacks which needs them all; `end` if none does.

        None as in `_leading_blocks`.
        """
        hashes = sequence.block_hashes
        for column in range(start, end):
            if column == len(hashes):
                if column >= may_hash:
                    return None
                self.hash_columns(sequence, min(end, column + _NUM_HASHES_AT_ONCE))
            for group in self._layout.full_groups:
                if find(content_key(hashes[column], group)) is None:
                    return column
        return end

    def _count_all(self, hashes: list[bytes], num_columns: int, *, find: _Find) -> int:
        """How many of so many columns, which the other groups have, exist in windowed groups as well."""
        return self._layout.longest_prefix(
            num_columns, lambda group, column: find(content_key(hashes[column], group)) is not None
        )

    def _table(self, hashes: list[bytes], num_columns: int, *, runs: list[list[int]]) -> list[int]:
        """The blocks of a prefix that is on the device; `runs`: of the groups that need all columns."""
        layout, num_groups = self._layout, self._layout.num_groups
        table = [NULL_BLOCK] * (num_columns * num_groups)
        for group, run in zip(layout.full_groups, runs, strict=True):
            assert len(run) >= num_columns, "a group lacks a column"
            table[group::num_groups] = run[:num_columns]
        for group, window in layout.windowed:
            first = layout.first_column(num_columns * layout.block_size, window)
            blocks = self._manager.find_leading(_keys(hashes[first:num_columns], group))
            assert len(blocks) == num_columns - first, "a window has a gap"
            table[first * num_groups + group :: num_groups] = blocks
        return table

    def _with_host_blocks(
        self, hashes: list[bytes], num_columns: int, *, device_table: list[int], host: HostTier
    ) -> PrefixHit:
        """A hit that has so many columns when the host's blocks are fetched."""
        layout = self._layout
        table = [NULL_BLOCK] * (num_columns * layout.num_groups)
        host_blocks = []
        for group, window in enumerate(layout.windows):
            first = layout.first_column(num_columns * layout.block_size, window)
            for column, key in enumerate(_keys(hashes[first:num_columns], group), first):
                entry = column * layout.num_groups + group
                block, host_block = self._manager.find(key), host.find(key)
                if block is not None:
                    table[entry] = block
                else:
                    assert host_block is not None, "it was found a moment ago"
                    host_blocks.append((entry, host_block))
        return PrefixHit(device_table, table, sorted(host_blocks))

    def find_confirmed(self, key: bytes) -> int | None:
        """The device block with this content, if that is certain."""
        block = self._manager.find(key)
        return None if block in self._unconfirmed else block

    def is_confirmed(self, block: int) -> bool:
        return block not in self._unconfirmed

    def start_from(self, sequence: Sequence, blocks: Iterable[int]) -> None:
        """`sequence` holds `blocks` from now on and reads them; it depends on those that are unconfirmed."""
        for block in blocks:
            self._manager.share((block,), found=True)
            if block in self._unconfirmed:
                readers = self._readers.setdefault(self._unconfirmed[block][0], [])
                if not readers or readers[-1] is not sequence:
                    readers.append(sequence)

    def join(self, leader: Sequence, sibling: Sequence) -> None:
        """`sibling` starts from its leader's prompt, and depends on what that depends on."""
        num_columns = leader.num_prompt_tokens // self._hasher.block_size
        self.hash_columns(leader, num_columns)
        sibling.block_hashes = leader.block_hashes[:num_columns]
        sibling.num_published_columns = num_columns
        for readers in self._readers.values():
            if leader in readers:
                readers.append(sibling)

    def depends_on_others(self, sequence: Sequence) -> bool:
        """Whether another request's step, still in flight, writes what this sequence's KV builds on."""
        unconfirmed = self._unconfirmed
        return bool(unconfirmed) and any(
            block in unconfirmed and unconfirmed[block][1].group is not sequence.group
            for block in sequence.block_table
        )

    # -- publishing -------------------------------------------------------------------------------

    def publish_launched(self, sequence: Sequence, step_id: int) -> None:
        """Publish the blocks of known tokens that `step_id` completes, as unconfirmed."""
        num_known_tokens = min(sequence.num_computed_tokens, len(sequence.token_ids))
        for publication in self._publish(sequence, num_known_tokens // self._hasher.block_size):
            self._publications.setdefault(step_id, []).append(publication)
            self._unconfirmed[publication.block] = (step_id, sequence)

    def publish_confirmed(self, sequence: Sequence) -> None:
        """Publish what is certain: all tokens before the newest have KV, of steps that ended well."""
        num_columns = (len(sequence.token_ids) - 1) // self._hasher.block_size
        if num_columns > sequence.num_published_columns:
            self._publish(sequence, num_columns)

    def publish_arrived(self, sequence: Sequence) -> None:
        """Publish a moved sequence's blocks again, those that were published before it moved."""
        num_columns, sequence.num_published_columns = sequence.num_published_columns, 0
        self._publish(sequence, num_columns)

    def _publish(self, sequence: Sequence, num_columns: int) -> list[_Publication]:
        """Publish the blocks of columns up to `num_columns`, but those that lie behind a window already."""
        first = sequence.num_published_columns
        if num_columns <= first:
            return []
        self.hash_columns(sequence, num_columns)
        sequence.num_published_columns = num_columns
        num_groups = self._layout.num_groups
        publications = []
        for column in range(first, num_columns):
            blocks = sequence.block_table[column * num_groups : (column + 1) * num_groups]
            for group, block in enumerate(blocks):
                key = content_key(sequence.block_hashes[column], group)
                if block != NULL_BLOCK and self._manager.publish(block, key):
                    publications.append(_Publication(sequence, block, key))
        return publications

    # -- how steps end ----------------------------------------------------------------------------

    def confirm(self, step_id: int) -> None:
        """The step ended well: what it published is certain."""
        for publication in self._publications.pop(step_id, ()):
            del self._unconfirmed[publication.block]
        self._readers.pop(step_id, None)

    def withdraw(self, step_id: int, failed: Iterable[Sequence]) -> list[Sequence]:
        """The step failed, and `failed` were in it. Returns the others whose KV builds on it.

        What these have published in later steps is withdrawn as well, and so on.
        """
        for publication in self._publications.pop(step_id, ()):
            self._withdraw(publication)
        tainted = dict.fromkeys(failed)
        num_failed = len(tainted)
        tainted.update(dict.fromkeys(self._readers.pop(step_id, ())))
        pending = list(tainted)
        while pending:
            sequence = pending.pop()
            for later_step, publications in self._publications.items():
                lost = [publication for publication in publications if publication.sequence is sequence]
                for publication in lost:
                    self._withdraw(publication)
                    publications.remove(publication)
                if lost:
                    new = [reader for reader in self._readers.get(later_step, ()) if reader not in tainted]
                    tainted.update(dict.fromkeys(new))
                    pending.extend(new)
        return list(tainted)[num_failed:]

    def _withdraw(self, publication: _Publication) -> None:
        del self._unconfirmed[publication.block]
        self._manager.withdraw(publication.block, publication.key)

    # -- pins -------------------------------------------------------------------------------------

    @property
    def num_pinned_blocks(self) -> int:
        """Blocks that pins hold, each counted once."""
        return len({block for pin in self._pins.values() for block in pin.blocks})

    @property
    def pinned_tables(self) -> list[tuple[int, ...]]:
        return [pin.blocks for pin in self._pins.values()]

    def pin(self, token_ids: list[int], cache_salt: str | None) -> PinnedPrefix:
        """Keep the certain blocks of this prefix on the device, as far as they exist and the quota goes.

        In windowed groups those are kept that the token behind the prefix sees.
        """
        layout = self._layout
        hashes: list[bytes] = []
        end = len(token_ids) // layout.block_size
        self._hasher.extend(hashes, token_ids, num_blocks=end, cache_salt=cache_salt)
        num_columns = self._count_all(hashes, self._count_pinnable(hashes), find=self.find_confirmed)
        find = self._manager.find_leading
        runs = [find(_keys(hashes[:num_columns], group)) for group in layout.full_groups]
        blocks = [block for block in self._table(hashes, num_columns, runs=runs) if block != NULL_BLOCK]
        self._manager.share(blocks)
        pin = PinnedPrefix(self._next_pin_id, num_columns * layout.block_size, tuple(blocks))
        self._next_pin_id += 1
        self._pins[pin.pin_id] = pin
        return pin

    def _count_pinnable(self, hashes: list[bytes]) -> int:
        """How many columns the groups have that need them all, within the quota less the others' windows."""
        layout, end = self._layout, len(hashes)
        num_in_windows = sum(
            end - layout.first_column(end * layout.block_size, window) for _, window in layout.windowed
        )
        pinned = {block for pin in self._pins.values() for block in pin.blocks}
        for column, content_hash in enumerate(hashes):
            for group in layout.full_groups:
                block = self.find_confirmed(content_key(content_hash, group))
                if block is None:
                    return column
                pinned.add(block)
            if len(pinned) + num_in_windows > self._max_pinned_blocks:
                return column
        return end

    def unpin(self, pin_id: int) -> None:
        """Let a pinned prefix grow cold again. Raises KeyError for an unknown pin."""
        self._manager.release(reversed(self._pins.pop(pin_id).blocks))
