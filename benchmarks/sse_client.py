"""A cheap HTTP client for streamed completions: one keep-alive connection, bytes and times only.

Owns sending a request and recording what arrived when. While a load runs it parses no JSON, so that on
a machine with few cores the client takes as little as it can from the server that it measures; what the
bytes mean is worked out afterwards, by `read_completion`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools


class LoadError(Exception):
    """A request that did not end as it should; the message says what the server did."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go. Plain http only: a load generator beside its server has no use for TLS."""

    host: str
    port: int
    path: str
    api_key: str | None = None

    @staticmethod
    def parse(url: str, path: str, *, api_key: str | None = None) -> Endpoint:
        """`url` with or without a trailing `/v1`. Raises ValueError."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{url!r} is not an http:// address.")
        base = parts.path.rstrip("/").removesuffix("/v1")
        return Endpoint(parts.hostname, parts.port or 80, base + path, api_key)

    def request(self, body: bytes | None = None) -> bytes:
        """The bytes of a POST of a JSON body, or of a GET."""
        lines = [
            f"{'GET' if body is None else 'POST'} {self.path} HTTP/1.1",
            f"Host: {self.host}:{self.port}",
            "Accept: text/event-stream",
        ]
        if self.api_key is not None:
            lines.append(f"Authorization: Bearer {self.api_key}")
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


@dataclass(slots=True)
class Exchange:
    """One request and the answer's body, piece by piece. Times are `time.perf_counter` seconds."""

    start: float
    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Completion:
    """What a streamed completion looked like from outside. Times are `time.perf_counter` seconds.

    token_times: arrival of each event that carried text; tokens that end no character carry none and
    arrive with a later event. num_tokens: the server's own count where it gives one.
    """

    start: float
    token_times: tuple[float, ...]
    end: float
    num_tokens: int
    num_prompt_tokens: int
    text: str


class Connection(asyncio.Protocol):
    """A keep-alive connection that carries one exchange at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._exchange: Exchange | None = None
        self._done: asyncio.Future[Exchange] | None = None
        self._now = 0.0

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def send(self, request: bytes) -> Exchange:
        """Send a request's bytes and wait for the whole answer. Raises LoadError when it is cut off."""
        assert self._transport is not None and self._done is None
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._exchange = Exchange(start=time.perf_counter())
        self._transport.write(request)
        try:
            return await self._done
        finally:
            self._done = None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"the answer is not HTTP: {error}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"the connection was cut in the middle of an answer ({exc or 'closed by the server'})")

    def _fail(self, message: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(LoadError(message))

    # httptools' callbacks

    def on_body(self, body: bytes) -> None:
        assert self._exchange is not None
        self._exchange.pieces.append((self._now, body))

    def on_message_complete(self) -> None:
        assert self._exchange is not None
        self._exchange.status = self._parser.get_status_code()
        # Asked here: once the message is over, the parser has forgotten it.
        if not self._parser.should_keep_alive():
            self.close()
        if self._done is not None and not self._done.done():
            self._done.set_result(self._exchange)


async def connect(endpoint: Endpoint) -> Connection:
    """Open a connection. Raises OSError."""
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, endpoint.host, endpoint.port)
    return connection


def sse_events(pieces: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """(time of its last byte, data) of each server-sent event, however the stream was cut.

    Lines end in LF or CRLF; several `data:` lines of an event are joined by LF; comments and other
    fields are left out, and so is an event that the stream's end cuts off.
    """
    buffer = b""
    data: list[bytes] = []
    for when, piece in pieces:
        *lines, buffer = (buffer + piece).split(b"\n")
        for ended in lines:
            line = ended.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield when, b"\n".join(data)
                data = []


def read_completion(exchange: Exchange) -> Completion:
    """What a finished exchange of a streamed chat or completion says.

    Raises LoadError for anything but a whole answer.
    """
    if exchange.status != 200:
        raise LoadError(f"HTTP {exchange.status}: {exchange.body[:300].decode(errors='replace')}")
    token_times: list[float] = []
    texts: list[str] = []
    usage: dict[str, int] = {}
    done = False
    end = exchange.start
    for when, data in sse_events(exchange.pieces):
        end = when
        if data == b"[DONE]":
            done = True
            continue
        event = json.loads(data)
        if "error" in event:
            raise LoadError(f"the stream broke off: {event['error']}")
        usage = event.get("usage") or usage
        text = "".join(
            (choice.get("delta") or {}).get("content") or choice.get("text") or ""
            for choice in event["choices"]
        )
        if text:
            token_times.append(when)
            texts.append(text)
    if not done:
        raise LoadError("the stream ended without [DONE]")
    if not token_times:
        raise LoadError("the answer has no text")
    return Completion(
        start=exchange.start,
        token_times=tuple(token_times),
        end=end,
        num_tokens=usage.get("completion_tokens", len(token_times)),
        num_prompt_tokens=usage.get("prompt_tokens", 0),
        text="".join(texts),
    )
