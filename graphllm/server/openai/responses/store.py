"""Finished and running responses by id, within a bound of entries, bytes and age.

Owns what is kept and for how long. What a response or an item looks like is not known here: both are JSON
bytes. A conversation is a chain of turns, each holding only its own items, so that a long conversation is
stored once however many of its responses can be continued. Removing a response frees the turns that no
other response builds on; a conversation can be continued as long as its last response is there.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from graphllm.errors import GraphLLMError, NotFoundError

# What an entry or a turn costs beside its bytes: the objects around them.
OVERHEAD_BYTES = 512
# How many ids of removed responses are remembered, to tell a client why one is gone.
MAX_REMEMBERED_IDS = 4096

_EVICTED = "was removed to make room for newer ones (--max-stored-responses, --response-store-size)"
_EXPIRED = "has expired (--response-ttl)"
_DELETED = "was deleted"
_UNKNOWN = "is not stored here: it never was, or was removed long ago"


class StoreFullError(GraphLLMError):
    """Nothing can be removed, because all that is stored is still running (429)."""

    status = 429
    type = "rate_limit_error"
    default_code = "response_store_full"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """max_bytes counts items, response objects and the event logs of background streams.

    max_age: seconds from a response's creation. max_responses 0 stores nothing.
    """

    max_responses: int = 1024
    max_bytes: int = 256 * 1024**2
    max_age: float = 30 * 86400.0


class BackgroundRun(Protocol):
    """What the store knows of a response that needs no connection."""

    @property
    def is_running(self) -> bool: ...

    @property
    def num_log_bytes(self) -> int:
        """Of the events that are kept for clients that come back."""
        ...


@dataclass(slots=True, eq=False)
class Turn:
    """What one response added to its conversation: JSON arrays of items.

    num_holders: the responses and turns that need it.
    """

    previous: Turn | None
    input_items: bytes
    output_items: bytes = b"[]"
    num_holders: int = 0

    @property
    def num_bytes(self) -> int:
        return OVERHEAD_BYTES + len(self.input_items) + len(self.output_items)

    def history(self) -> Iterator[Turn]:
        """This turn and all before it, the first one first."""
        turns = []
        turn: Turn | None = self
        while turn is not None:
            turns.append(turn)
            turn = turn.previous
        return reversed(turns)


@dataclass(slots=True, eq=False)
class StoredResponse:
    """head: the response object's JSON without its `output`. background: None if a client waited for it."""

    response_id: str
    turn: Turn
    head: bytes
    background: BackgroundRun | None = None
    created: float = 0.0

    @property
    def is_running(self) -> bool:
        return self.background is not None and self.background.is_running

    @property
    def body(self) -> bytes:
        return body_with_output(self.head, self.turn.output_items)


def body_with_output(head: bytes, output_items: bytes) -> bytes:
    """A response object: `head`, a JSON object with members, and its output."""
    return head[:-1] + b',"output":' + output_items + b"}"


class ResponseStore:
    """Removes the oldest responses when a limit is passed; running ones stay.

    now: the clock, in seconds.
    """

    def __init__(self, limits: StoreLimits, *, now: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._now = now
        # In order of creation.
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._turn_sizes: dict[Turn, int] = {}
        self._removed: OrderedDict[str, str] = OrderedDict()
        self.num_bytes = 0

    @property
    def is_enabled(self) -> bool:
        return self._limits.max_responses > 0

    def __len__(self) -> int:
        return len(self._responses)

    def get(self, response_id: str, *, param: str | None = None) -> StoredResponse:
        """Raises NotFoundError that says why there is none."""
        self._expire()
        stored = self._responses.get(response_id)
        if stored is None:
            reason = self._removed.get(response_id, _UNKNOWN)
            raise NotFoundError(f"Response '{response_id[:80]}' {reason}.", param=param)
        return stored

    def add(self, stored: StoredResponse) -> None:
        """Keep it, and remove older ones for it.

        One that alone is larger than the bound is removed again at once, unless it is running.
        """
        assert self.is_enabled and stored.response_id not in self._responses
        self._expire()
        stored.created = self._now()
        self._responses[stored.response_id] = stored
        self._sizes[stored.response_id] = 0
        self._hold(stored.turn)
        self.changed(stored)

    def check_room(self) -> None:
        """Raises StoreFullError when a running response would find nothing to remove for it."""
        limits = self._limits
        num_running = sum(stored.is_running for stored in self._responses.values())
        if num_running >= limits.max_responses or (
            num_running == len(self._responses) and self.num_bytes >= limits.max_bytes
        ):
            raise StoreFullError(
                f"{num_running} background responses are running, which is all that the store holds "
                "(--max-stored-responses, --response-store-size); try again when some have ended.",
                param="background",
            )

    def changed(self, stored: StoredResponse) -> None:
        """Its bytes have changed: it grew, or has ended."""
        if self._responses.get(stored.response_id) is not stored:
            return  # deleted while it ran
        size = OVERHEAD_BYTES + len(stored.head)
        if stored.background is not None:
            size += stored.background.num_log_bytes
        self.num_bytes += size - self._sizes[stored.response_id]
        self._sizes[stored.response_id] = size
        if stored.turn in self._turn_sizes:
            self.num_bytes += stored.turn.num_bytes - self._turn_sizes[stored.turn]
            self._turn_sizes[stored.turn] = stored.turn.num_bytes
        self._evict()

    def delete(self, response_id: str) -> StoredResponse:
        """Remove it for a client. Raises NotFoundError."""
        stored = self.get(response_id)
        self._remove(stored, _DELETED)
        return stored

    def _expire(self) -> None:
        oldest_allowed = self._now() - self._limits.max_age
        expired = []
        for stored in self._responses.values():
            if stored.created >= oldest_allowed:
                break
            if not stored.is_running:
                expired.append(stored)
        for stored in expired:
            self._remove(stored, _EXPIRED)

    def _evict(self) -> None:
        if not self._is_over():
            return
        for stored in list(self._responses.values()):
            if not stored.is_running:
                self._remove(stored, _EVICTED)
                if not self._is_over():
                    return

    def _is_over(self) -> bool:
        limits = self._limits
        return len(self._responses) > limits.max_responses or self.num_bytes > limits.max_bytes

    def _remove(self, stored: StoredResponse, reason: str) -> None:
        del self._responses[stored.response_id]
        self.num_bytes -= self._sizes.pop(stored.response_id)
        self._release(stored.turn)
        self._removed[stored.response_id] = reason
        if len(self._removed) > MAX_REMEMBERED_IDS:
            self._removed.popitem(last=False)

    def _hold(self, turn: Turn) -> None:
        """One more needs the turn; the first to do so makes it count, and hold what is before it."""
        needed: Turn | None = turn
        while needed is not None:
            needed.num_holders += 1
            if needed.num_holders > 1:
                return
            self._turn_sizes[needed] = needed.num_bytes
            self.num_bytes += needed.num_bytes
            needed = needed.previous

    def _release(self, turn: Turn) -> None:
        freed: Turn | None = turn
        while freed is not None:
            freed.num_holders -= 1
            if freed.num_holders > 0:
                return
            self.num_bytes -= self._turn_sizes.pop(freed)
            freed = freed.previous
