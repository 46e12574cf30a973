"""How far a client is behind in reading what was written to it.

Owns the bookkeeping of back-pressure. It never waits and never closes anything: writes go through
at once, because the writer is the engine's step loop, and the connection asks here afterwards
whether the client keeps up.
"""

from __future__ import annotations

from typing import Protocol


class WriteBuffer(Protocol):
    """The side of an asyncio transport that is looked at here."""

    def get_write_buffer_size(self) -> int: ...


class FlowControl:
    """Watches one connection's write buffer.

    Two questions about a slow client, because either alone can be cheated: does it have too much
    unread (`is_overrun`), and has it taken anything lately (`is_stalled`)?
    """

    __slots__ = (
        "_buffer",
        "_last_progress",
        "_max_unread_bytes",
        "_num_drained",
        "_num_written",
        "is_writable",
    )

    def __init__(self, buffer: WriteBuffer, *, max_unread_bytes: int, now: float) -> None:
        self._buffer = buffer
        self._max_unread_bytes = max_unread_bytes
        self._num_written = 0
        self._num_drained = 0
        self._last_progress = now
        # False between the transport's pause_writing and resume_writing: its buffer is above the
        # high-water mark, so nothing that could wait should be started.
        self.is_writable = True

    def record_write(self, num_bytes: int) -> None:
        self._num_written += num_bytes

    @property
    def unread_bytes(self) -> int:
        """Bytes written that the kernel has not taken yet."""
        return self._buffer.get_write_buffer_size()

    @property
    def is_overrun(self) -> bool:
        return self._buffer.get_write_buffer_size() > self._max_unread_bytes

    def is_stalled(self, now: float, timeout: float) -> bool:
        """Whether bytes have been waiting for `timeout` seconds and none of them left.

        The buffer's size alone would not tell: it grows with new writes while the client reads. So
        progress is counted in bytes that have left it. To be asked at regular intervals.
        """
        unread = self._buffer.get_write_buffer_size()
        drained = self._num_written - unread
        if unread == 0 or drained > self._num_drained:
            self._num_drained = drained
            self._last_progress = now
            return False
        return now - self._last_progress >= timeout
