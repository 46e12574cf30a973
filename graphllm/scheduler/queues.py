"""Where the sequences are that have not ended: waiting, running, or moved between the tiers.

Owns the three lists and their order, arrival. Decides nothing.
"""

from __future__ import annotations

from collections import deque

from graphllm.sequence import Sequence, SequenceStatus


class Queues:
    """`waiting` holds nothing yet; `running` has slots; `moved` is swapped or waits for a copy.

    Each is in order of arrival, so the newest is last. Siblings that have not joined are in none.
    """

    __slots__ = ("moved", "running", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.moved: list[Sequence] = []

    def add_waiting(self, sequence: Sequence) -> None:
        """Queue a sequence that has been further along: before all that arrived later."""
        waiting, place = self.waiting, _place(sequence)
        index = 0
        while index < len(waiting) and _place(waiting[index]) < place:
            index += 1
        waiting.insert(index, sequence)

    def add_running(self, sequence: Sequence) -> None:
        _insert(self.running, sequence)

    def add_moved(self, sequence: Sequence) -> None:
        _insert(self.moved, sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a queued sequence out, wherever it is."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        elif is_moved(sequence):
            self.moved.remove(sequence)
        else:
            self.waiting.remove(sequence)


def is_moved(sequence: Sequence) -> bool:
    """Whether it does not run and yet owns KV, on either tier or between them."""
    if sequence.status is SequenceStatus.SWAPPED:
        return True
    return sequence.status is SequenceStatus.WAITING and (
        sequence.transfer_id is not None or bool(sequence.block_table)
    )


def has_arrived(sequence: Sequence) -> bool:
    """Whether all blocks of a moved sequence are on the device, so that it needs a slot and no more."""
    return sequence.transfer_id is None and bool(sequence.block_table)


def is_away(sequence: Sequence) -> bool:
    """Whether a moved sequence's KV is on the host or on its way there."""
    return not sequence.block_table


def _insert(ordered: list[Sequence], sequence: Sequence) -> None:
    index, place = len(ordered), _place(sequence)
    while index and _place(ordered[index - 1]) > place:
        index -= 1
    ordered.insert(index, sequence)


def _place(sequence: Sequence) -> tuple[int, int]:
    return sequence.group.order, sequence.index
