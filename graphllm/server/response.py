"""The answer to one request: a whole body at once, or a stream of chunks.

Owns the wire form of responses. Does not own the socket: it writes to a channel, which is the
connection as seen from here, and which may be gone at any time.

Whoever writes an answer is often the engine's step loop, with other streams to serve. So no method
here waits, and none raises because of what a client did: on a dead connection all of them are
silent no-ops.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Protocol

from graphllm.errors import GraphLLMError
from graphllm.server.message import Request

HeaderPairs = Sequence[tuple[str, str]]

JSON = "application/json"

_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in HTTPStatus}
_STATUSES_WITHOUT_BODY = frozenset({204, 304})
_LAST_CHUNK = b"0\r\n\r\n"
# A header value must not be able to end its line.
_ONE_LINE = str.maketrans("\r\n\0", "   ")


class Channel(Protocol):
    """What an answer needs of its connection. Nothing here raises or blocks."""

    @property
    def unread_bytes(self) -> int: ...

    @property
    def is_draining(self) -> bool:
        """The server is shutting down, so this answer is to be the connection's last."""
        ...

    def write(self, data: bytes) -> None: ...

    def write_stream(self, data: bytes) -> None:
        """Write, unless the client is too far behind: then the connection is cut."""
        ...

    def end_response(self, *, keep_alive: bool) -> None: ...

    def cut_response(self, *, reset: bool) -> None:
        """Close in the middle of an answer. With `reset`, by a TCP reset, which drops unsent bytes."""
        ...


class Response:
    """Call `send` once, or `start_stream`, `write_chunk` any number of times, then `end_stream`.

    It may be kept and written to long after the handler returned. Requests that the client sent
    behind this one wait until it has ended.

    A dialect may set `error_body`, how it writes errors (OpenAI's form unless set), and `extra_headers`,
    which every answer gets.
    """

    __slots__ = (
        "_channel",
        "_is_chunked",
        "_is_head",
        "_is_http10",
        "_keep_alive",
        "error_body",
        "extra_headers",
        "is_started",
    )

    def __init__(self, channel: Channel, *, method: str, http_version: str, keep_alive: bool) -> None:
        # None once the answer has ended or the client is gone.
        self._channel: Channel | None = channel
        self._is_head = method == "HEAD"
        self._is_http10 = http_version == "1.0"
        self._keep_alive = keep_alive
        self._is_chunked = False
        self.error_body: Callable[[GraphLLMError], Mapping[str, Any]] = GraphLLMError.body
        self.extra_headers: HeaderPairs = ()
        self.is_started = False

    @property
    def is_open(self) -> bool:
        """Whether writing still has an effect: not ended, and the client not known to be gone."""
        return self._channel is not None

    @property
    def buffered_bytes(self) -> int:
        """Bytes written on this connection that the kernel has not taken yet; 0 when not open."""
        return 0 if self._channel is None else self._channel.unread_bytes

    def send(self, status: int, body: bytes, *, content_type: str = JSON, headers: HeaderPairs = ()) -> None:
        """The whole answer. HEAD requests, 204 and 304 get the header lines only."""
        channel = self._channel
        if channel is None:
            return
        keep_alive = self._keep_alive and not channel.is_draining
        has_body = status not in _STATUSES_WITHOUT_BODY
        if has_body:
            headers = (("Content-Type", content_type), ("Content-Length", str(len(body))), *headers)
        head = self._begin(status, headers, keep_alive=keep_alive)
        channel.write(head + body if has_body and not self._is_head else head)
        self._end(keep_alive=keep_alive)

    def send_error(self, error: GraphLLMError, *, headers: HeaderPairs = ()) -> None:
        """The whole answer, in the dialect's error form. A stream that has begun is cut instead."""
        if self.is_started:
            self.abort_stream()
        else:
            # The standard library's encoder, because it takes any string.
            self.send(error.status, json.dumps(self.error_body(error)).encode(), headers=headers)

    def start_stream(self, *, content_type: str, headers: HeaderPairs = (), status: int = 200) -> None:
        """Send the header lines of an answer whose length is not known yet."""
        channel = self._channel
        if channel is None:
            return
        # HTTP/1.0 has no chunks: there the end of the connection is the end of the body.
        self._is_chunked = not self._is_http10
        self._keep_alive = self._keep_alive and self._is_chunked and not channel.is_draining
        headers = (("Content-Type", content_type), *headers)
        if self._is_chunked:
            headers = (*headers, ("Transfer-Encoding", "chunked"))
        channel.write(self._begin(status, headers, keep_alive=self._keep_alive))

    def write_chunk(self, data: bytes) -> None:
        """Send `data` as one chunk, with one write.

        A write is a system call, and most of what a token costs here: callers join what one step
        has for one client, and give the last of it to `end_stream`.
        """
        channel = self._channel
        # An empty chunk would end the stream.
        if channel is None or self._is_head or not data:
            return
        channel.write_stream(self._frame(data))

    def end_stream(self, data: bytes = b"") -> None:
        """End the body, after a last chunk with `data` if there is any."""
        channel = self._channel
        if channel is None:
            return
        if not self._is_head:
            last = (self._frame(data) if data else b"") + (_LAST_CHUNK if self._is_chunked else b"")
            if last:
                channel.write_stream(last)
        self._end(keep_alive=self._keep_alive)

    def abort_stream(self) -> None:
        """Cut the connection, so that the client cannot take what it has for the whole answer.

        Chunks already written still go out; the missing last chunk tells that there was to be more.
        Where the end of the connection is the end of the body, only a reset tells.
        """
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.cut_response(reset=self.is_started and not self._is_chunked)

    def detach(self) -> None:
        """Called by the connection when it is gone: writing has no effect from now on."""
        self._channel = None

    def _frame(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._is_chunked else data

    def _begin(self, status: int, headers: HeaderPairs, *, keep_alive: bool) -> bytes:
        assert not self.is_started, "an answer begins once"
        self.is_started = True
        lines = [_STATUS_LINES.get(status) or f"HTTP/1.1 {status} \r\n"]
        lines += [
            f"{name}: {value.translate(_ONE_LINE)}\r\n" for name, value in (*headers, *self.extra_headers)
        ]
        if not keep_alive:
            lines.append("Connection: close\r\n")
        elif self._is_http10:
            lines.append("Connection: keep-alive\r\n")
        lines.append("\r\n")
        return "".join(lines).encode("latin-1", "replace")

    def _end(self, *, keep_alive: bool) -> None:
        # The write before may have found that the client is gone, and detached us.
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.end_response(keep_alive=keep_alive)


# Called on the loop with a complete request. It must not block; for an answer that takes time it
# keeps the response and writes later. What it raises is answered as an error.
Handler = Callable[[Request, Response], None]
