"""When the garbage collector runs in a serving process.

A full collection with torch and the tokenizer loaded takes hundreds of milliseconds, in which every
stream stands still. After warm-up everything alive is frozen out of later collections, the
collector's own schedule is switched off, and collections run where the loop has time.
"""

from __future__ import annotations

import gc

_YOUNG_OBJECTS = 2_000  # allocations between young collections
_YOUNG_COLLECTIONS = 50  # young ones between full ones


class GarbageKeeper:
    """Does nothing unless `enabled`."""

    __slots__ = ("_enabled", "_frozen", "_num_young")

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._frozen = False
        self._num_young = 0

    def freeze(self) -> None:
        """After warm-up: what is alive now is never traversed again."""
        if not self._enabled:
            return
        gc.collect()
        gc.freeze()
        gc.disable()
        self._frozen = True

    def after_step(self) -> None:
        """Right after a step was applied: the next one is running, so there is time."""
        if not self._frozen or gc.get_count()[0] < _YOUNG_OBJECTS:
            return
        self._num_young += 1
        if self._num_young < _YOUNG_COLLECTIONS:
            gc.collect(0)
        else:
            self.when_idle()

    def when_idle(self) -> None:
        """Nothing runs: collect everything that came since the freeze."""
        if self._frozen and self._num_young:
            gc.collect()
            self._num_young = 0

    def release(self) -> None:
        """Give the collector back to Python."""
        if self._frozen:
            gc.enable()
            gc.unfreeze()
            self._frozen = False
