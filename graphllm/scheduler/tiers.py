"""Moves KV blocks between the device and the host: swaps, and the prefix cache's cold end.

Owns the transfers that are due or under way and what each is for. Which sequence has to go or may come
back is the scheduler's to decide, the copies themselves are the swapper's.

A transfer is a holder of its blocks on both tiers, so that none is used again before it has ended,
whatever becomes of the sequence meanwhile. It may end late, out of order, or badly: a sequence whose
blocks were lost is queued to be computed again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from graphllm.batch import BlockTransfer, TransferDirection
from graphllm.cache.block_manager import NULL_BLOCK, BlockManager
from graphllm.cache.host_tier import HostTier
from graphllm.cache.prefix_hash import content_key
from graphllm.scheduler.kv_counters import KVCounters
from graphllm.scheduler.prefix_sharing import PrefixHit, PrefixSharing
from graphllm.scheduler.queues import Queues
from graphllm.scheduler.windows import release_behind_windows
from graphllm.sequence import Sequence, SequenceStatus

_MAX_OFFLOADED_AT_ONCE = 64
_LOW_FREE_SHARE = 8  # an eighth of the blocks, or two steps' worth, should be there without loss


class TransferPredictor(Protocol):
    """How long a copy up, and computing the same tokens instead, would take."""

    def seconds_to_copy(self, num_blocks: int) -> float: ...

    def seconds_to_prefill(self, num_tokens: int) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantRates:
    """A predictor that has measured nothing. A copy takes `copy_latency` beside its blocks' time."""

    seconds_per_block: float = 0.0
    seconds_per_token: float = 1e-4
    copy_latency: float = 0.0

    def seconds_to_copy(self, num_blocks: int) -> float:
        return self.copy_latency + num_blocks * self.seconds_per_block

    def seconds_to_prefill(self, num_tokens: int) -> float:
        return num_tokens * self.seconds_per_token


class _Purpose(Enum):
    SWAP_OUT = auto()
    SWAP_IN = auto()
    FETCH = auto()
    OFFLOAD = auto()


@dataclass(frozen=True, slots=True)
class _Transfer:
    """What a transfer is for. Its `sequence` may have ended or gone elsewhere since."""

    purpose: _Purpose
    device_blocks: tuple[int, ...]
    host_blocks: tuple[int, ...]
    sequence: Sequence | None = None
    hashes: tuple[bytes, ...] = ()  # of the blocks' contents, when they go to the prefix cache
    num_leaving: int = 0  # device blocks that nobody else holds


class SwapInOutcome(Enum):
    """STARTED: its copy is under way. NO_ROOM: not now. LOST: some of its KV is nowhere any more."""

    STARTED = auto()
    NO_ROOM = auto()
    LOST = auto()


class Tiers:
    """The transfers between one block manager and one host tier."""

    def __init__(
        self,
        manager: BlockManager,
        host: HostTier,
        *,
        queues: Queues,
        prefixes: PrefixSharing,
        counters: KVCounters,
        predictor: TransferPredictor,
        max_swaps_per_sequence: int,
    ) -> None:
        self.host = host
        self.num_leaving_blocks = 0  # device blocks that become free when transfers end
        self._manager = manager
        self._queues = queues
        self._prefixes = prefixes
        self._counters = counters
        self._predictor = predictor
        self._max_swaps = max_swaps_per_sequence
        self._due: list[BlockTransfer] = []
        self._transfers: dict[int, _Transfer] = {}
        self._next_id = 1

    @property
    def has_transfers(self) -> bool:
        """Whether a transfer is due or under way."""
        return bool(self._transfers)

    def take_due(self) -> list[BlockTransfer]:
        due, self._due = self._due, []
        return due

    # -- swapping ---------------------------------------------------------------------------------

    def can_swap_out(self, sequence: Sequence) -> bool:
        """Whether the sequence may go to the host tier, and there is certainly room for it."""
        num_needed = self._manager.layout.num_needed(
            sequence.num_computed_tokens, num_settled=sequence.num_settled_tokens
        )
        return (
            sequence.num_swaps < self._max_swaps
            and sequence.num_computed_tokens > 0
            and not sequence.group.keeps_device_state
            and num_needed <= self.host.num_free_swap_blocks
            and not self._prefixes.depends_on_others(sequence)
        )

    def swap_out(self, sequence: Sequence) -> None:
        """Start to move a sequence that just stopped running; its blocks stay held until they are copied.

        Published blocks that others hold, or that the host tier has, are not copied, nor are those behind
        windows.
        """
        manager, host = self._manager, self.host
        release_behind_windows(sequence, manager)
        layout = manager.layout
        num_entries = layout.num_columns(sequence.num_computed_tokens) * layout.num_groups
        kept: list[int] = sequence.block_table[num_entries:]
        sources: list[int] = []
        copied: list[int] = []  # their entries
        entries: list[int | bytes | None] = []
        for index, block in enumerate(sequence.block_table[:num_entries]):
            key = manager.hash_of(block)
            host_block = None if key is None else host.find(key)
            if host_block is not None:
                host.share((host_block,))
                entries.append(host_block)
                kept.append(block)
            elif key is not None and manager.reference_count(block) > 1:
                entries.append(key)
                kept.append(block)
            else:
                entries.append(None)
                if block != NULL_BLOCK:
                    copied.append(index)
                    sources.append(block)
        targets = host.allocate_swap(len(sources))
        for index, target in zip(copied, targets, strict=True):
            entries[index] = target
        sequence.host_blocks = entries
        sequence.block_table = []
        sequence.status = SequenceStatus.SWAPPED
        sequence.num_swaps += 1
        sequence.swapped_at_step = manager.launched_step
        self._queues.add_moved(sequence)
        self._counters.num_swapped_out_blocks += len(sources)
        manager.release(reversed(kept))
        if sources:
            host.share(targets)
            num_leaving = sum(manager.reference_count(block) == 1 for block in sources)
            # The sequence's hold on the sources becomes the transfer's.
            sequence.transfer_id = self._start(
                _Transfer(
                    _Purpose.SWAP_OUT, tuple(sources), tuple(targets), sequence, num_leaving=num_leaving
                )
            )

    def swap_in(self, sequence: Sequence, *, num_spare_blocks: int) -> SwapInOutcome:
        """Reserve all blocks of a swapped sequence and one token's more, and start to copy them back.

        Blocks whose content is still cached on the device are shared instead. `num_spare_blocks` must
        remain for others.
        """
        manager, prefixes = self._manager, self._prefixes
        if sequence.transfer_id is not None or sequence.swapped_at_step > manager.completed_step:
            return SwapInOutcome.NO_ROOM
        assert sequence.num_in_flight_tokens == 0, "a step that has ended was not applied"
        layout = manager.layout
        sources: list[int] = []
        shared: list[int] = []
        table: list[int | None] = []  # None: of a new block
        for index, entry in enumerate(sequence.host_blocks):
            if entry is None:
                table.append(NULL_BLOCK)
                continue
            column, group = divmod(index, layout.num_groups)
            key = entry if isinstance(entry, bytes) else None
            if column < sequence.num_published_columns:
                key = content_key(sequence.block_hashes[column], group)
            block = None if key is None else prefixes.find_confirmed(key)
            table.append(block)
            if block is not None:
                shared.append(block)
                continue
            source = self.host.find(entry) if isinstance(entry, bytes) else entry
            if source is None:
                return SwapInOutcome.LOST
            sources.append(source)
        num_entries = layout.num_columns(sequence.num_computed_tokens + 1) * layout.num_groups
        num_new = num_entries - len(table) + len(sources)
        num_idle = sum(manager.reference_count(block) == 0 for block in shared)
        if num_new + num_idle + num_spare_blocks > manager.num_free_blocks:
            return SwapInOutcome.NO_ROOM
        manager.share(shared)
        new = manager.allocate(num_new)
        pairs = list(zip(sources, new, strict=False))
        fresh = iter(new)
        sequence.block_table = [next(fresh) if block is None else block for block in table]
        sequence.block_table.extend(fresh)
        # The transfer holds what it reads, and the sequence has nothing on the host any more.
        self.host.share(source for source, _ in pairs)
        self.drop_host_blocks(sequence)
        self._counters.num_swapped_in_blocks += len(pairs)
        self._bring_up(sequence, pairs, purpose=_Purpose.SWAP_IN)
        return SwapInOutcome.STARTED

    def drop_host_blocks(self, sequence: Sequence) -> None:
        """The sequence needs its host copies no more."""
        self.host.release(entry for entry in reversed(sequence.host_blocks) if isinstance(entry, int))
        sequence.host_blocks = []

    # -- the prefix cache's cold end --------------------------------------------------------------

    def should_fetch(self, hit: PrefixHit) -> bool:
        """Whether copying the host's part of a hit up is sooner done than computing it."""
        if not hit.host_blocks:
            return False
        num_columns = (len(hit.fetched_table) - len(hit.device_table)) // self._manager.layout.num_groups
        seconds = self._predictor.seconds_to_prefill(num_columns * self._manager.block_size)
        return self._predictor.seconds_to_copy(len(hit.host_blocks)) < seconds

    def fetch(self, sequence: Sequence, hit: PrefixHit) -> None:
        """Start to copy the host's part of a waiting sequence's prefix up. The caller checked for room."""
        manager, num_groups = self._manager, self._manager.layout.num_groups
        self._prefixes.start_from(sequence, hit.fetched_table)
        # One column more, for the tokens behind the prefix.
        new = manager.allocate(len(hit.host_blocks) + num_groups)
        sequence.block_table = hit.fetched_table + new[len(hit.host_blocks) :]
        pairs = []
        for (entry, host_block), block in zip(hit.host_blocks, new, strict=False):
            sequence.block_table[entry] = block
            pairs.append((host_block, block))
        self.host.share(host_block for host_block, _ in pairs)
        sequence.num_published_columns = len(hit.fetched_table) // num_groups
        sequence.num_computed_tokens = sequence.num_published_columns * manager.block_size
        self._queues.add_moved(sequence)
        self._counters.num_fetched_blocks += len(pairs)
        self._bring_up(sequence, pairs, purpose=_Purpose.FETCH)

    def offload_cold(self, num_spare_blocks: int) -> None:
        """Copy the coldest cached blocks down when room runs low, before they have to be given up.

        They can be found all the while. `num_spare_blocks` stay out of it, so that no step lacks a block
        because of a copy.
        """
        manager, host = self._manager, self.host
        if host.num_cache_blocks == 0:
            return
        low = max(manager.num_usable_blocks // _LOW_FREE_SHARE, num_spare_blocks)
        # Copies under way will be lossless room when they have ended: slow ones must not bring more of them.
        under_way = (each for each in self._transfers.values() if each.purpose is _Purpose.OFFLOAD)
        num_wanted = low - manager.num_lossless_blocks - sum(len(each.device_blocks) for each in under_way)
        num_wanted = min(num_wanted, manager.num_free_blocks - num_spare_blocks, _MAX_OFFLOADED_AT_ONCE)
        sources: list[int] = []
        targets: list[int] = []
        hashes: list[bytes] = []
        for _ in range(num_wanted):
            block = manager.coldest()
            if block is None:
                break
            content_hash = manager.hash_of(block)
            assert content_hash is not None, "a cached block has a hash"
            if host.find(content_hash) is not None:
                manager.mark_backed(block)
                continue
            target = host.allocate_cache()
            if target is None:
                break
            manager.share((block,))
            sources.append(block)
            targets.append(target)
            hashes.append(content_hash)
        if sources:
            ends = tuple(sources), tuple(targets)
            num_leaving = len(sources)
            self._start(_Transfer(_Purpose.OFFLOAD, *ends, hashes=tuple(hashes), num_leaving=num_leaving))

    # -- how transfers end ------------------------------------------------------------------------

    def completed(self, transfer_id: int, *, failed: bool) -> None:
        """The copy has ended and touches nothing any more."""
        transfer = self._transfers.pop(transfer_id)
        self.num_leaving_blocks -= transfer.num_leaving
        if transfer.purpose is _Purpose.OFFLOAD:
            if not failed:
                for host_block, content_hash in zip(transfer.host_blocks, transfer.hashes, strict=True):
                    self.host.publish(host_block, content_hash)
                self._counters.num_offloaded_blocks += len(transfer.host_blocks)
            self._manager.release(transfer.device_blocks, backed=not failed)
            self.host.release(transfer.host_blocks)
            return
        # The last block first on both tiers, so that leaves are given up before roots.
        self._manager.release(reversed(transfer.device_blocks))
        self.host.release(reversed(transfer.host_blocks))
        sequence = transfer.sequence
        if sequence is None or sequence.transfer_id != transfer_id:
            return
        if failed:
            sequence.skips_host_lookup = transfer.purpose is _Purpose.FETCH
            self.recompute(sequence)
            return
        sequence.transfer_id = None
        if transfer.purpose is not _Purpose.SWAP_OUT:
            self._arrive(sequence)

    def recompute(self, sequence: Sequence) -> None:
        """A moved sequence's KV is lost: it waits to be computed again."""
        if sequence.status is SequenceStatus.SWAPPED:
            self._counters.num_recomputed += 1
        self._queues.moved.remove(sequence)
        self._manager.release(reversed(sequence.block_table))
        self.drop_host_blocks(sequence)
        forget_computed(sequence)
        self._queues.add_waiting(sequence)

    def _bring_up(self, sequence: Sequence, pairs: list[tuple[int, int]], *, purpose: _Purpose) -> None:
        if not pairs:  # everything was still on the device
            self._arrive(sequence)
            return
        targets = tuple(target for _, target in pairs)
        self._manager.share(targets)
        sources = tuple(source for source, _ in pairs)
        sequence.transfer_id = self._start(_Transfer(purpose, targets, sources, sequence))

    def _arrive(self, sequence: Sequence) -> None:
        """All blocks are there. It runs for at least a block's length before it may be swapped again."""
        sequence.min_tokens_to_swap = sequence.num_computed_tokens + self._manager.block_size
        self._prefixes.publish_arrived(sequence)

    def _start(self, transfer: _Transfer) -> int:
        transfer_id = self._next_id
        self._next_id += 1
        self._transfers[transfer_id] = transfer
        self.num_leaving_blocks += transfer.num_leaving
        is_out = transfer.purpose in (_Purpose.SWAP_OUT, _Purpose.OFFLOAD)
        ends = (transfer.device_blocks, transfer.host_blocks)
        sources, targets = ends if is_out else reversed(ends)
        direction = TransferDirection.OUT if is_out else TransferDirection.IN
        self._due.append(BlockTransfer(transfer_id, direction, tuple(zip(sources, targets, strict=True))))
        return transfer_id

    # -- for the checker --------------------------------------------------------------------------

    def device_holds(self) -> Iterable[tuple[int, ...]]:
        return (transfer.device_blocks for transfer in self._transfers.values())

    def host_holds(self) -> Iterable[tuple[int, ...]]:
        return (transfer.host_blocks for transfer in self._transfers.values())


def forget_computed(sequence: Sequence) -> None:
    """The sequence's KV is gone: it waits as if it had never run, with the tokens that it has."""
    sequence.status = SequenceStatus.WAITING
    sequence.block_table = []
    sequence.num_computed_tokens = 0
    sequence.num_published_columns = 0
    sequence.min_tokens_to_swap = 0
    sequence.transfer_id = None
