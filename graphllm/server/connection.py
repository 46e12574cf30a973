"""One client's connection: which request is being answered, which wait, and when it ends.

Owns order, time and the end of connections. The reading of requests is in `request_parser.py`, the
form of answers in `response.py`, what they say in the handlers.

Three rules explain most of this file:

- Reading is never paused. While it is paused neither FIN nor RST is seen, and a generation whose
  client has left goes on for nobody. What a client may send ahead is bounded by giving up instead.
- One request is answered at a time, in order. An error in the input takes its place in that order:
  earlier requests get their answers, then the error goes out, then the connection closes.
- There are no tasks and no timers for single connections. The server asks each one now and then
  whether a deadline has passed, so a request costs no timer.

A connection and its requests, responses and parser refer to each other; every end of a request
takes those references apart, so that nothing is left for the garbage collector.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from graphllm.errors import GraphLLMError
from graphllm.server.flow_control import FlowControl
from graphllm.server.http_errors import (
    RequestTimeoutError,
    TooManyConnectionsError,
    TooManyPipelinedRequestsError,
)
from graphllm.server.message import HttpLimits, Request
from graphllm.server.request_parser import ReadPhase, RequestParser
from graphllm.server.response import Handler, Response

logger = logging.getLogger(__name__)

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
# SO_LINGER on with zero seconds: closing sends a reset.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(slots=True)
class HttpCounters:
    """What an HTTP server has seen, for metrics to read."""

    connections_open: int = 0
    connections_total: int = 0
    requests_total: int = 0
    # Requests and connections refused before a handler saw them.
    refused_total: int = 0
    # Clients cut because they did not read.
    slow_clients_total: int = 0


@dataclass(slots=True, eq=False)
class ServerState:
    """What the connections of one server share."""

    handler: Handler
    limits: HttpLimits
    counters: HttpCounters = field(default_factory=HttpCounters)
    connections: set[HttpConnection] = field(default_factory=set)
    is_draining: bool = False


class HttpConnection(asyncio.Protocol):
    """Implements asyncio's protocol towards the transport and `Channel` towards responses."""

    def __init__(self, server: ServerState) -> None:
        self._server = server
        self._limits = server.limits
        self._loop = asyncio.get_running_loop()
        self._parser = RequestParser(server.limits)
        self._current: Request | None = None
        self._response: Response | None = None
        self._waiting: deque[Request] = deque()
        self._num_waiting_bytes = 0
        # The answer to the input that could not be read; the last one.
        self._final_error: GraphLLMError | None = None
        # The reading phase, and since when. An idle phase counts from the end of the last answer.
        self._phase = ReadPhase.IDLE
        self._phase_since = self._loop.time()
        # No more writing: the transport is closed, or our side of it is.
        self._is_closed = False
        # Our side is closed and the client's FIN is awaited.
        self._is_lingering = False
        self._is_counted = False

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._flow = FlowControl(
            self._transport, max_unread_bytes=self._limits.max_unread_bytes, now=self._phase_since
        )
        counters, connections = self._server.counters, self._server.connections
        connections.add(self)
        counters.connections_total += 1
        if len(connections) > 2 * self._limits.max_connections:
            self._abort()  # not even the refusals are unlimited
        elif self._server.is_draining or counters.connections_open >= self._limits.max_connections:
            self._refuse(
                TooManyConnectionsError("The server has all the connections it allows; try again later.")
            )
            self._dispatch()
        else:
            self._is_counted = True
            counters.connections_open += 1

    def data_received(self, data: bytes) -> None:
        if self._is_closed:
            return
        num_taken = len(self._waiting) + (self._current is not None)
        requests = self._parser.feed(data, room=1 + self._limits.max_pipelined_requests - num_taken)
        self._enqueue(requests)
        if requests or self._parser.phase is not self._phase:
            self._phase, self._phase_since = self._parser.phase, self._loop.time()
        if self._parser.error is not None:
            self._refuse(self._parser.error)
        self._dispatch()

    def pause_writing(self) -> None:
        self._flow.is_writable = False

    def resume_writing(self) -> None:
        self._flow.is_writable = True
        self._dispatch()

    def eof_received(self) -> None:
        # A client may close only its sending side and still read. Those are rare, clients that have
        # left are not, and the two look the same: a FIN before the answer's end counts as leaving.
        self._drop_requests()
        self._close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_closed = True
        self._drop_requests()
        self._parser.close()
        self._server.connections.discard(self)
        if self._is_counted:
            self._server.counters.connections_open -= 1

    # What responses call (`Channel`).

    @property
    def unread_bytes(self) -> int:
        return self._flow.unread_bytes

    @property
    def is_draining(self) -> bool:
        return self._server.is_draining

    def write(self, data: bytes) -> None:
        if self._is_closed:
            return  # the transport would raise
        self._flow.record_write(len(data))
        self._transport.write(data)

    def write_stream(self, data: bytes) -> None:
        # Asked before writing: a large chunk by itself says nothing of the client.
        if self._flow.is_overrun:
            self._cut_slow_client()
        else:
            self.write(data)

    def end_response(self, *, keep_alive: bool) -> None:
        if self._current is not None:
            self._current.on_disconnect = None
        self._current = self._response = None
        if not keep_alive:
            self._close_in_peace()
            return
        if self._phase is ReadPhase.IDLE:
            self._phase_since = self._loop.time()
        if self._waiting or self._final_error or self._parser.awaits_continue or self._server.is_draining:
            # In a pass of its own: this may be the engine's loop, in the middle of a step's answers.
            self._loop.call_soon(self._dispatch)

    def cut_response(self, *, reset: bool) -> None:
        if self._current is not None:
            self._current.on_disconnect = None  # the handler knows
        if reset and not self._is_closed:
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self._abort()
        else:
            self._close()
        self._drop_requests()

    # What the server calls.

    def check_deadlines(self, now: float) -> None:
        """Close what has taken too long. Called every `sweep_interval`."""
        if self._flow.is_stalled(now, self._limits.stall_timeout):
            self._cut_slow_client()
        elif self._is_lingering:
            if self.unread_bytes:
                self._phase_since = now  # the wait for FIN begins when the answer has gone out
            elif now - self._phase_since >= self._limits.linger_timeout:
                self._abort()
        elif not self._is_closed and now >= self._reading_deadline():
            if self._phase is ReadPhase.IDLE:
                self._close()
            else:
                self._refuse(RequestTimeoutError("The request did not arrive in time."))
                self._dispatch()

    def drain(self) -> None:
        """Close now if idle, else when the requests that have begun are answered."""
        if self._is_lingering or (self._phase is ReadPhase.IDLE and not self._is_busy):
            self._close()

    def cut(self) -> None:
        """Close now, whatever is in progress."""
        self._abort()
        self._drop_requests()

    # Requests.

    @property
    def _is_busy(self) -> bool:
        return self._current is not None or bool(self._waiting) or self._final_error is not None

    def _enqueue(self, requests: Sequence[Request]) -> None:
        for request in requests:
            # One body may be as large as the limit; all that wait together may be no larger.
            if self._num_waiting_bytes + len(request.body) > self._limits.max_body_bytes:
                self._refuse(
                    TooManyPipelinedRequestsError(
                        "Too much was sent on this connection without waiting for answers."
                    )
                )
                return
            self._num_waiting_bytes += len(request.body)
            self._waiting.append(request)

    def _refuse(self, error: GraphLLMError) -> None:
        """Read no further; the error is answered when all before it are."""
        self._parser.close()
        self._phase = ReadPhase.CLOSED
        if self._final_error is None:
            self._final_error = error
            self._server.counters.refused_total += 1

    def _dispatch(self) -> None:
        """Start the next thing that is due on this connection, if it is free.

        A client that has not read earlier answers gets no new ones begun, so that what it makes
        the server hold is bounded by one answer.
        """
        if self._is_closed or self._current is not None or not self._flow.is_writable:
            return
        if self._waiting:
            self._start(self._waiting.popleft())
        elif self._final_error is not None:
            error, self._final_error = self._final_error, None
            response = Response(self, method=self._parser.method, http_version="1.1", keep_alive=False)
            response.send_error(error)
        elif self._parser.awaits_continue:
            self._parser.awaits_continue = False
            self._phase_since = self._loop.time()
            self.write(_CONTINUE)
        elif self._server.is_draining:
            self.drain()

    def _start(self, request: Request) -> None:
        self._num_waiting_bytes -= len(request.body)
        self._server.counters.requests_total += 1
        response = Response(
            self, method=request.method, http_version=request.http_version, keep_alive=request.keep_alive
        )
        self._current, self._response = request, response
        try:
            self._server.handler(request, response)
        except GraphLLMError as error:
            response.send_error(error)
        except Exception:
            logger.exception("%s %s failed", request.method, request.path)
            response.send_error(GraphLLMError("The server had an error while handling this request."))

    def _drop_requests(self) -> None:
        """Nobody waits for the answers any more: tell those who are working on them."""
        dropped = [*([self._current] if self._current is not None else []), *self._waiting]
        if self._response is not None:
            self._response.detach()
        self._current = self._response = self._final_error = None
        self._waiting.clear()
        self._num_waiting_bytes = 0
        for request in dropped:
            request.disconnected = True
            on_disconnect, request.on_disconnect = request.on_disconnect, None
            if on_disconnect is None:
                continue
            try:
                on_disconnect()
            except Exception:
                logger.exception("on_disconnect of %s %s failed", request.method, request.path)

    # Time and endings.

    def _reading_deadline(self) -> float:
        """When the bytes that are awaited must be here, on the loop's clock."""
        limits = self._limits
        match self._phase:
            case ReadPhase.IDLE:
                return math.inf if self._is_busy else self._phase_since + limits.keep_alive_timeout
            case ReadPhase.HEAD:
                return self._phase_since + limits.header_timeout
            case ReadPhase.BODY:
                if self._parser.awaits_continue:
                    return math.inf  # it is our turn
                seconds_earned = self._parser.num_body_bytes / limits.min_body_rate
                return self._phase_since + limits.body_timeout + seconds_earned
            case ReadPhase.CLOSED:
                return math.inf

    def _cut_slow_client(self) -> None:
        self._server.counters.slow_clients_total += 1
        logger.warning("a client left %d bytes unread; its connection is cut", self.unread_bytes)
        self.cut()

    def _close_in_peace(self) -> None:
        """Close our side and wait for the client to close its own.

        Closing both at once while the client still sends, say the rest of a body that was refused,
        would make the kernel answer with a reset, which can destroy the answer on its way
        (RFC 9112, 9.6).
        """
        self._drop_requests()
        if self._server.is_draining:
            self._close()
        elif not self._is_closed:
            self._parser.close()
            self._is_closed = self._is_lingering = True
            self._phase_since = self._loop.time()
            self._transport.write_eof()

    def _close(self) -> None:
        """Close both sides when what was written has gone out."""
        self._is_closed = True
        self._transport.close()

    def _abort(self) -> None:
        """Close both sides now, and drop what has not gone out."""
        self._is_closed = True
        self._transport.abort()
