"""Proves that no block, slot or sequence is lost, shared wrongly or owned twice.

Reads everything and changes nothing. The scheduler is passed in, so that this file can see it whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

from graphllm.cache.block_manager import NULL_BLOCK
from graphllm.cache.prefix_hash import content_key
from graphllm.scheduler.queues import is_moved, place
from graphllm.sequence import Sequence, SequenceStatus

if TYPE_CHECKING:
    from graphllm.scheduler.scheduler import Scheduler


def check(scheduler: Scheduler, *, full: bool) -> None:
    """See `Scheduler.check`. Raises AssertionError."""
    manager = scheduler.block_manager
    _check_written_blocks(scheduler)
    if full or manager.layout.windowed:
        _check_windows(scheduler)
    tables = _device_holders(scheduler)
    if not full:
        manager.check_touched(tables)
    else:
        manager.check(tables)
        _check_hashes(scheduler)
        _check_queues(scheduler)
        scheduler.host_tier.check(
            [
                *(
                    [entry for entry in each.host_blocks if isinstance(entry, int)]
                    for each in scheduler.moved
                ),
                *scheduler.tiers.host_holds(),
            ]
        )
    owned = {sequence.slot for sequence in scheduler.running}
    assert len(owned) == len(scheduler.running) == scheduler.slots.num_held, "slots and their owners differ"
    scheduler.slots.adapters.check(sum(each.group.adapter is not None for each in scheduler.running))


def _device_holders(scheduler: Scheduler) -> list[SequenceOf[int]]:
    """Everybody's blocks: running and moved sequences, transfers, pins."""
    return [
        *(sequence.block_table for sequence in scheduler.running),
        *(sequence.block_table for sequence in scheduler.moved),
        *scheduler.tiers.device_holds(),
        *scheduler.prefixes.pinned_tables,
    ]


def _check_written_blocks(scheduler: Scheduler) -> None:
    """What the step just scheduled writes belongs to its row alone, and to siblings that join with it."""
    batch = scheduler.last_batch
    if batch is None:
        return
    manager = scheduler.block_manager
    layout = manager.layout
    num_sharers = [1] * len(batch.rows)
    for pair in batch.pairs:
        num_sharers[pair.row] += pair.sequence is not batch.rows[pair.row].sequence
    for row, most in zip(batch.rows, num_sharers, strict=True):
        end = row.sequence.num_computed_tokens
        if row.sequence.slot != row.slot:  # it has ended since
            continue
        first = (end - row.num_tokens) // manager.block_size
        written = slice(first * layout.num_groups, layout.num_columns(end) * layout.num_groups)
        for block in row.sequence.block_table[written]:
            assert block != NULL_BLOCK, "a row writes where it has no block"
            assert manager.reference_count(block) <= most, "a block is written that others hold"


def _check_hashes(scheduler: Scheduler) -> None:
    """Every published block that a sequence holds is named after its owner's tokens."""
    if not scheduler.limits.enable_prefix_caching:
        return
    manager = scheduler.block_manager
    size, num_groups = manager.block_size, manager.layout.num_groups
    for sequence in (*scheduler.running, *scheduler.moved):
        num_full = min(len(sequence.token_ids) // size, len(sequence.block_table) // num_groups)
        hashes: list[bytes] = []
        scheduler.hasher.extend(
            hashes,
            sequence.token_ids,
            num_blocks=num_full,
            cache_salt=sequence.group.cache_salt,
            adapter_load=sequence.group.adapter_load,
        )
        keys = [content_key(content_hash, group) for content_hash in hashes for group in range(num_groups)]
        for block, expected in zip(sequence.block_table, keys, strict=False):
            assert manager.hash_of(block) in (None, expected), "a block's hash differs from its content"
        for block in sequence.block_table[len(keys) :]:
            assert manager.hash_of(block) is None, "a block that is not full has a hash"
        known = sequence.block_hashes
        assert known[:num_full] == hashes[: len(known)], "a sequence's hashes differ from its tokens"


def _check_windows(scheduler: Scheduler) -> None:
    """Every group has what its window shows to a token still to come, and no more than it may hold."""
    layout = scheduler.block_manager.layout
    num_groups, most = layout.num_groups, scheduler.limits.max_num_batched_tokens
    for sequence in (*scheduler.running, *scheduler.moved):
        table: SequenceOf[object] = sequence.block_table or sequence.host_blocks
        absent = NULL_BLOCK if sequence.block_table else None
        assert len(table) % num_groups == 0, "a column that not all groups have"
        for group, window in enumerate(layout.windows):
            is_there = [entry != absent for entry in table[group::num_groups]]
            first = layout.first_column(sequence.num_settled_tokens, window)
            assert all(is_there[first:]), "a block inside a window was released"
            assert sorted(is_there) == is_there, "a block behind a released one is held"
            assert sum(is_there) <= layout.most_columns(window, most), "blocks behind a window are held"


def _check_queues(scheduler: Scheduler) -> None:
    """Each sequence is where its status says, and owns KV on one tier, or between the two."""
    assert all(each.status is SequenceStatus.RUNNING for each in scheduler.running)
    for sequence in scheduler.waiting:
        assert sequence.status is SequenceStatus.WAITING and not is_moved(sequence)
    for sequence in scheduler.moved:
        assert is_moved(sequence) and sequence.slot is None
    for sequence in (*scheduler.running, *scheduler.waiting):
        assert not sequence.host_blocks and sequence.transfer_id is None
    for sequence in scheduler.moved:
        assert not (sequence.host_blocks and sequence.block_table), "KV with two owner tiers"
        assert sequence.host_blocks or sequence.block_table, "a moved sequence has no KV"
    _check_order(scheduler.running)
    _check_order(scheduler.waiting)
    _check_order(scheduler.moved)


def _check_order(sequences: Iterable[Sequence]) -> None:
    places = [place(sequence) for sequence in sequences]
    assert places == sorted(places), "a queue is out of order"
