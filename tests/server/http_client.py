"""A raw HTTP client and a server on a loopback port, for tests that care about single bytes."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import uvloop

from graphllm.server.http import Handler, HttpLimits, HttpServer, Request, Response

GET = b"GET / HTTP/1.1\r\nHost: test\r\n\r\n"


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run a test on uvloop, for twenty seconds at most."""
    uvloop.run(asyncio.wait_for(test, 20))


async def until(condition: Any) -> None:
    """Let the loop run until `condition()` holds."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


@asynccontextmanager
async def serving(handler: Handler, **limits: Any) -> AsyncIterator[HttpServer]:
    """A server that looks at deadlines often; what the loop had to report is an error."""
    reports: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
    server = HttpServer(handler, limits=HttpLimits(**{"sweep_interval": 0.01, **limits}))
    await server.start("127.0.0.1", 0)
    try:
        yield server
    finally:
        await server.close(timeout=0)
    assert reports == []


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The OpenAI error object."""
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return dict(error)


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    @asynccontextmanager
    async def connect(cls, server: HttpServer, *, receive_buffer: int | None = None) -> AsyncIterator[Client]:
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", server.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=2**16)
        try:
            yield cls(reader, writer)
        finally:
            writer.transport.abort()

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def ask(self, data: bytes, *, head: bool = False) -> Answer:
        self.send(data)
        return await self.answer(head=head)

    async def answer(self, *, head: bool = False) -> Answer:
        """The next response, whole; interim ones are passed over."""
        status, headers = await self.head()
        while status == 100:
            status, headers = await self.head()
        if head or status in (204, 304):
            body = b""
        elif headers.get("transfer-encoding") == "chunked":
            body = b"".join([chunk async for chunk in self.chunks()])
        elif "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
        else:
            body = await self.reader.read()
        return Answer(status, headers, body)

    async def head(self) -> tuple[int, dict[str, str]]:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        version, status, _ = lines[0].split(" ", 2)
        assert version == "HTTP/1.1"
        return int(status), {
            name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:] if line)
        }

    async def chunks(self) -> AsyncIterator[bytes]:
        """The chunks of a body up to its end. Raises IncompleteReadError when it is cut."""
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        assert await self.reader.readexactly(2) == b"\r\n"

    async def at_end(self) -> bool:
        """Whether the server has ended the connection and sent nothing more."""
        return await self.reader.read(1) == b""

    def reset(self) -> None:
        """Leave without a goodbye: the server gets RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


def echo(request: Request, response: Response) -> None:
    """Answers with what it understood of the request."""
    body = b" ".join([request.method.encode(), request.raw_path, request.query, request.body])
    response.send(200, body, content_type="text/plain")


class Desk:
    """A handler that answers nothing by itself: tests take the requests and answer them later."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.responses: list[Response] = []
        self.num_disconnects = 0

    def __call__(self, request: Request, response: Response) -> None:
        request.on_disconnect = self._count_disconnect
        self.requests.append(request)
        self.responses.append(response)

    def _count_disconnect(self) -> None:
        self.num_disconnects += 1

    async def take(self, index: int = 0) -> Response:
        """The response of the request that arrived as number `index`."""
        await until(lambda: len(self.responses) > index)
        return self.responses[index]
