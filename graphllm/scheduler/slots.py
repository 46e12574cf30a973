"""Which running sequence owns which slot, a row of the device-resident tables.

Owns the free slots, their generations, and the fence: a released slot is given out again only when
no step in flight can still touch its row. With a slot goes the hold on its sequence's adapter.
"""

from __future__ import annotations

from collections import deque

from graphllm.adapter import Adapter
from graphllm.scheduler.adapter_places import AdapterPlaces


class SlotAllocator:
    """`num_slots` slots. Every owner of one has a generation, which no earlier owner of any slot had.

    adapters: the device's places for adapters, none unless they are served.
    """

    __slots__ = (
        "_completed_step",
        "_free",
        "_generation",
        "_launched_step",
        "_pending",
        "_place_of_slot",
        "adapters",
        "num_slots",
    )

    def __init__(self, num_slots: int, *, adapters: AdapterPlaces | None = None) -> None:
        self.num_slots = num_slots
        self.adapters = adapters or AdapterPlaces(0)
        self._place_of_slot: dict[int, int] = {}
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

    def take(self, adapter: Adapter | None = None) -> tuple[int, int]:
        """A free slot and a new generation. The caller has checked that there is one, and that the adapter
        of the sequence that takes it is ready."""
        slot = self._free.popleft()
        self._generation += 1
        if adapter is not None:
            self._place_of_slot[slot] = self.adapters.take(adapter)
        return slot, self._generation

    def adapter_place(self, slot: int) -> int:
        """Where the adapter of a slot's owner lies, -1 without one."""
        return self._place_of_slot.get(slot, -1)

    def release(self, slot: int) -> None:
        place = self._place_of_slot.pop(slot, None)
        if place is not None:
            self.adapters.release(place)
        if self._launched_step > self._completed_step:
            self._pending.append((self._launched_step, slot))
        else:
            self._free.append(slot)

    def step_launched(self, step_id: int) -> None:
        self._launched_step = step_id
        self.adapters.step_launched(step_id)

    def step_completed(self, step_id: int) -> None:
        self._completed_step = step_id
        self.adapters.step_completed(step_id)
        while self._pending and self._pending[0][0] <= step_id:
            self._free.append(self._pending.popleft()[1])
