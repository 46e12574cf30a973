"""A constraint for the simulated device: its mask is a number that any lost, late or extra token changes."""

from __future__ import annotations

import zlib


class SimulatedConstraint:
    """Shifts the fake model's tokens by `shift`, which depends on every token accepted so far."""

    __slots__ = ("_state", "num_accepted")

    def __init__(self) -> None:
        self._state = 1
        self.num_accepted = 0

    @property
    def shift(self) -> int:
        """What stands for a mask: the token that the model wants is moved by it."""
        return self._state % 89

    def restrict(self, mask: memoryview) -> None:
        raise AssertionError("the simulated device has no masks")

    def accept(self, token_id: int) -> None:
        assert not self.is_finished, "a token behind the end"
        self._state = zlib.crc32(bytes((token_id,)), self._state)
        self.num_accepted += 1

    @property
    def is_finished(self) -> bool:
        return self.num_accepted > 0 and self._state % 23 == 0
