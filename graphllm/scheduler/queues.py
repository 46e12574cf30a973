"""Where the sequences are that have not ended: waiting, running, or moved between the tiers.

Owns the three lists and their order: priority, then arrival. Decides nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import MutableSequence

from graphllm.sequence import Sequence, SequenceStatus


class Queues:
    """`waiting` holds nothing yet; `running` has slots; `moved` is swapped or waits for a copy.

    Each is in order of `place`, so the newest of the lowest priority is last. Siblings that have not joined
    are in none.
    """

    __slots__ = ("moved", "running", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.moved: list[Sequence] = []

    def add_waiting(self, sequence: Sequence) -> None:
        """Queue a sequence at its place: mostly last when it is new, early when it has run before."""
        _insert(self.waiting, sequence)

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


def place(sequence: Sequence) -> tuple[int, int, int]:
    """Smaller runs earlier, and gives way later: priority, arrival, number in its group."""
    group = sequence.group
    return group.priority, group.order, sequence.index


def _insert(ordered: MutableSequence[Sequence], sequence: Sequence) -> None:
    if not ordered or place(ordered[-1]) < place(sequence):
        ordered.append(sequence)
    else:
        ordered.insert(bisect_left(ordered, place(sequence), key=place), sequence)
