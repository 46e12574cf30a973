"""Which blocks of a prompt exist already, and which of those are certain.

Owns the look-up of prefixes, the publication of full blocks, what is known about publications whose
step has not ended, and pinned prefixes. Blocks are the block manager's, sequences the scheduler's.

A prompt block is published when its step is launched: later steps run behind it and may read it. Until
the step has ended well the content is unconfirmed, and nobody but such a step may use it (no swap, no
copy to the host). When the step fails its publications are withdrawn, and whoever read them, directly
or through others, has computed nothing. Generated blocks are published when their tokens are known.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from graphllm.cache.block_manager import BlockManager
from graphllm.cache.host_tier import HostTier
from graphllm.cache.prefix_hash import PrefixHasher
from graphllm.sequence import Sequence

_NUM_HASHES_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The leading full blocks of a sequence that exist: on the device, and behind those on the host."""

    device_blocks: list[int]
    host_blocks: list[int]


NO_HIT = PrefixHit([], [])


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
    content_hash: bytes


class PrefixSharing:
    """The prefix cache's policy over one block manager; at most `max_pinned_blocks` stay pinned."""

    def __init__(self, manager: BlockManager, hasher: PrefixHasher, *, max_pinned_blocks: int) -> None:
        self._manager = manager
        self._hasher = hasher
        self._max_pinned_blocks = max_pinned_blocks
        self._publications: dict[int, list[_Publication]] = {}  # by step
        self._unconfirmed: dict[int, tuple[int, Sequence]] = {}  # block: its step and publisher
        self._readers: dict[int, list[Sequence]] = {}  # by step, those that started from its blocks
        self._pins: dict[int, PinnedPrefix] = {}
        self._next_pin_id = 1

    # -- looking up -------------------------------------------------------------------------------

    def hash_blocks(self, sequence: Sequence, num_blocks: int) -> None:
        """Make sure that the hashes of the first `num_blocks` blocks are known."""
        self._hasher.extend(
            sequence.block_hashes,
            sequence.token_ids,
            num_blocks=num_blocks,
            cache_salt=sequence.group.cache_salt,
            adapter_load=sequence.group.adapter_load,
        )

    def look_up(self, sequence: Sequence, host: HostTier, *, max_new_hashes: int | None) -> PrefixHit | None:
        """The longest prefix that exists, always without the block of the last token.

        None when `max_new_hashes` were not enough to tell; the next look-up goes on from there.
        """
        if sequence.group.skips_prefix_lookup:
            return NO_HIT
        max_blocks = (len(sequence.token_ids) - 1) // self._hasher.block_size
        device_blocks: list[int] = []
        host_blocks: list[int] = []
        hashes = sequence.block_hashes
        may_hash = len(hashes) + max_blocks if max_new_hashes is None else len(hashes) + max_new_hashes
        for index in range(max_blocks):
            if index == len(hashes):
                if index >= may_hash:
                    return None
                self.hash_blocks(sequence, min(max_blocks, index + _NUM_HASHES_AT_ONCE))
            block = None if host_blocks else self._manager.find(hashes[index])
            if block is not None:
                device_blocks.append(block)
                continue
            block = host.find(hashes[index])
            if block is None:
                break
            host_blocks.append(block)
        return PrefixHit(device_blocks, host_blocks)

    def find_confirmed(self, content_hash: bytes) -> int | None:
        """The device block with this content, if that is certain."""
        block = self._manager.find(content_hash)
        return None if block in self._unconfirmed else block

    def is_confirmed(self, block: int) -> bool:
        return block not in self._unconfirmed

    def start_from(self, sequence: Sequence, blocks: Iterable[int]) -> None:
        """`sequence` holds `blocks` from now on and reads them; it depends on those that are unconfirmed."""
        for block in blocks:
            self._manager.share((block,))
            if block in self._unconfirmed:
                readers = self._readers.setdefault(self._unconfirmed[block][0], [])
                if not readers or readers[-1] is not sequence:
                    readers.append(sequence)

    def join(self, leader: Sequence, sibling: Sequence) -> None:
        """`sibling` starts from its leader's prompt, and depends on what that depends on."""
        num_blocks = leader.num_prompt_tokens // self._hasher.block_size
        self.hash_blocks(leader, num_blocks)
        sibling.block_hashes = leader.block_hashes[:num_blocks]
        sibling.num_published_blocks = num_blocks
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
        num_blocks = (len(sequence.token_ids) - 1) // self._hasher.block_size
        if num_blocks > sequence.num_published_blocks:
            self._publish(sequence, num_blocks)

    def publish_arrived(self, sequence: Sequence) -> None:
        """Publish a moved sequence's blocks again, those that were published before it moved."""
        num_blocks, sequence.num_published_blocks = sequence.num_published_blocks, 0
        self._publish(sequence, num_blocks)

    def _publish(self, sequence: Sequence, num_blocks: int) -> list[_Publication]:
        first = sequence.num_published_blocks
        if num_blocks <= first:
            return []
        self.hash_blocks(sequence, num_blocks)
        sequence.num_published_blocks = num_blocks
        return [
            _Publication(sequence, sequence.block_table[index], sequence.block_hashes[index])
            for index in range(first, num_blocks)
            if self._manager.publish(sequence.block_table[index], sequence.block_hashes[index])
        ]

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
        self._manager.withdraw(publication.block, publication.content_hash)

    # -- pins -------------------------------------------------------------------------------------

    @property
    def num_pinned_blocks(self) -> int:
        """Blocks that pins hold, each counted once."""
        return len({block for pin in self._pins.values() for block in pin.blocks})

    @property
    def pinned_tables(self) -> list[tuple[int, ...]]:
        return [pin.blocks for pin in self._pins.values()]

    def pin(self, token_ids: list[int], cache_salt: str | None) -> PinnedPrefix:
        """Keep the certain blocks of this prefix on the device, as far as they exist and the quota goes."""
        pinned = {block for pin in self._pins.values() for block in pin.blocks}
        hashes: list[bytes] = []
        num_blocks = len(token_ids) // self._hasher.block_size
        self._hasher.extend(hashes, token_ids, num_blocks=num_blocks, cache_salt=cache_salt)
        blocks: list[int] = []
        for content_hash in hashes:
            block = self.find_confirmed(content_hash)
            if block is None:
                break
            pinned.add(block)
            if len(pinned) > self._max_pinned_blocks:
                break
            blocks.append(block)
        self._manager.share(blocks)
        pin = PinnedPrefix(self._next_pin_id, len(blocks) * self._hasher.block_size, tuple(blocks))
        self._next_pin_id += 1
        self._pins[pin.pin_id] = pin
        return pin

    def unpin(self, pin_id: int) -> None:
        """Let a pinned prefix grow cold again. Raises KeyError for an unknown pin."""
        self._manager.release(reversed(self._pins.pop(pin_id).blocks))
