"""Which running sequence owns which slot, a row of the device-resident tables.

Owns the free slots, their generations, and the fence: a released slot is given out again only when
no step in flight can still touch its row.
"""

from __future__ import annotations

from collections import deque


class SlotAllocator:
    """`num_slots` slots. Every owner of one has a generation, which no earlier owner of any slot had."""

    __slots__ = ("_completed_step", "_free", "_generation", "_launched_step", "_pending", "num_slots")

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free: deque[int] = deque(range(num_slots))
        self._pending: deque[tuple[int, int]] = deque()
        self._generation = 0
        self._launched_step = 0
        self._completed_step = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return self.num_slots - len(self._free) - len(self._pending)

    def take(self) -> tuple[int, int]:
        """A free slot and a new generation. The caller has checked that there is one."""
        slot = self._free.popleft()
        self._generation += 1
        return slot, self._generation

    def release(self, slot: int) -> None:
        if self._launched_step > self._completed_step:
            self._pending.append((self._launched_step, slot))
        else:
            self._free.append(slot)

    def step_launched(self, step_id: int) -> None:
        self._launched_step = step_id

    def step_completed(self, step_id: int) -> None:
        self._completed_step = step_id
        while self._pending and self._pending[0][0] <= step_id:
            self._free.append(self._pending.popleft()[1])
