"""A request as handlers see it, and the limits on what a client may send or leave unread.

Owns the values only: `request_parser.py` makes requests out of bytes, `connection.py` decides when
a handler gets them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import overload


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """Bounds on one client and on all of them; sizes in bytes, times in seconds."""

    max_connections: int = 1024
    # Requests read ahead of the one being answered.
    max_pipelined_requests: int = 16
    max_target_bytes: int = 8 * 1024
    # Request line and header lines together; trailers are held to it as well.
    max_header_bytes: int = 64 * 1024
    max_headers: int = 100
    max_body_bytes: int = 32 * 1024**2
    # What a streamed answer may have waiting for a client that reads too slowly.
    max_unread_bytes: int = 8 * 1024**2

    header_timeout: float = 20.0
    # A body has this long, and longer by a second for every `min_body_rate` bytes that came: a big
    # upload on a thin line passes, a byte every ten seconds does not.
    body_timeout: float = 30.0
    min_body_rate: int = 4096
    # Longer than the 60 s after which reverse proxies drop idle connections, so that it is they who
    # close and no request meets a closing connection.
    keep_alive_timeout: float = 75.0
    # A client with unread bytes must take some of them within this time.
    stall_timeout: float = 30.0
    # After a last answer: how long to wait for the client to close its side.
    linger_timeout: float = 2.0
    # How often all of these times are checked.
    sweep_interval: float = 0.5


class Headers:
    """Header fields by name, in any case. Repeated fields are joined by a comma (RFC 9110, 5.2)."""

    __slots__ = ("_values",)

    def __init__(self, fields: Iterable[tuple[bytes, bytes]] = ()) -> None:
        self._values: dict[str, str] = {}
        for raw_name, raw_value in fields:
            name, value = raw_name.decode("ascii").lower(), raw_value.decode("latin-1")
            earlier = self._values.get(name)
            self._values[name] = value if earlier is None else f"{earlier}, {value}"

    @overload
    def get(self, name: str) -> str | None: ...
    @overload
    def get(self, name: str, default: str) -> str: ...
    def get(self, name: str, default: str | None = None) -> str | None:
        return self._values.get(name.lower(), default)

    def __contains__(self, name: str) -> bool:
        return name.lower() in self._values

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """(lower-case name, value) pairs."""
        return iter(self._values.items())


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """One complete request: its body has arrived in full before a handler sees it.

    `on_disconnect` may be set by the handler. It is called once, on the loop, when the client is
    found to be gone before the answer has ended; `disconnected` is true from then on.
    """

    method: str
    # As sent, before percent-decoding: only the router knows which slashes are data.
    raw_path: bytes
    query: bytes
    http_version: str
    headers: Headers
    body: bytes
    # What the client asked for; the answer may still close the connection.
    keep_alive: bool
    # Filled in by the router from the pattern that matched.
    path_params: dict[str, str] = field(default_factory=dict)
    disconnected: bool = False
    on_disconnect: Callable[[], None] | None = None

    @property
    def path(self) -> str:
        """The path as sent, for messages and logs."""
        return self.raw_path.decode("ascii", "replace")
