"""The HTTP server: listens, keeps its connections, and shuts down gracefully.

Owns the listening socket and the one timer. This is the module that the rest of the server
imports; it offers the names of the files below it. In the order of reading:

    message.py         a request, and the limits
    request_parser.py  bytes to requests
    response.py        answers to bytes
    flow_control.py    how far a client is behind
    connection.py      order, time and the end of one connection

Nothing in these files knows of models. They serve HTTP/1.1 and 1.0 in plain text; TLS, HTTP/2 and
access from the open internet are the business of a proxy in front.
"""

from __future__ import annotations

import asyncio

from graphllm.errors import StartupError
from graphllm.server.connection import HttpConnection, HttpCounters, ServerState
from graphllm.server.message import Headers, HttpLimits, Request
from graphllm.server.response import Handler, HeaderPairs, Response

__all__ = [
    "Handler",
    "HeaderPairs",
    "Headers",
    "HttpCounters",
    "HttpLimits",
    "HttpServer",
    "Request",
    "Response",
]

_BACKLOG = 2048
_DRAIN_POLL_INTERVAL = 0.01


class HttpServer:
    """Serves `handler` on one address, on the running event loop."""

    def __init__(self, handler: Handler, *, limits: HttpLimits | None = None) -> None:
        self._state = ServerState(handler, limits or HttpLimits())
        self.counters = self._state.counters
        self._server: asyncio.Server | None = None
        self._sweep_timer: asyncio.TimerHandle | None = None

    async def start(self, host: str, port: int) -> None:
        """Listen. Port 0 takes a free one. Raises StartupError when the address cannot be had."""
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: HttpConnection(self._state), host, port, backlog=_BACKLOG
            )
        except OSError as error:
            raise StartupError(f"Cannot listen on {host}:{port}: {error.strerror or error}.") from error
        self._sweep()

    @property
    def port(self) -> int:
        """The port it listens on."""
        assert self._server is not None, "the server has not started"
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self, *, timeout: float = 5.0) -> None:
        """Stop accepting, close idle connections, and let answers in progress end.

        What has not ended after `timeout` seconds is cut, and its `on_disconnect` called.
        """
        if self._server is None:
            return
        self._server.close()
        self._state.is_draining = True
        connections = self._state.connections
        for connection in list(connections):
            connection.drain()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while connections and loop.time() < deadline:
            await asyncio.sleep(_DRAIN_POLL_INTERVAL)
        for connection in list(connections):
            connection.cut()
        while connections:
            await asyncio.sleep(0)
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()

    def _sweep(self) -> None:
        """Look at the deadlines of all connections; it takes less than a microsecond each."""
        loop = asyncio.get_running_loop()
        self._sweep_timer = loop.call_later(self._state.limits.sweep_interval, self._sweep)
        now = loop.time()
        for connection in list(self._state.connections):
            connection.check_deadlines(now)
