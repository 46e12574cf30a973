"""Streamed answers: chunks, their end, and how a broken one is told from a finished one."""

from __future__ import annotations

import asyncio

import pytest

from graphllm.errors import StepFailedError
from graphllm.server.http import Request, Response
from tests.server.http_client import GET, Client, Desk, run, serving, until

TYPE = "text/event-stream"
GET10 = b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"


def test_chunks_arrive_as_they_are_written_and_the_connection_is_reused() -> None:
    async def test() -> None:
        desk = Desk()
        async with serving(desk) as server, Client.connect(server) as client:
            for index in range(3):
                client.send(GET)
                response = await desk.take(index)
                response.start_stream(content_type=TYPE, headers=(("X-Request-Id", "7"),))
                status, headers = await client.head()
                assert (status, headers["content-type"], headers["x-request-id"]) == (200, TYPE, "7")
                assert headers["transfer-encoding"] == "chunked" and "content-length" not in headers
                chunks = client.chunks()
                for data in (b"a", b"b" * 300, b"\r\n0\r\n\r\n"):
                    response.write_chunk(data)
                    assert await anext(chunks) == data
                response.end_stream(b"last")
                assert [chunk async for chunk in chunks] == [b"last"]
                assert not response.is_open

    run(test())


def test_empty_chunk_does_not_end_the_stream() -> None:
    async def test() -> None:
        desk = Desk()
        async with serving(desk) as server, Client.connect(server) as client:
            client.send(GET)
            response = await desk.take()
            response.start_stream(content_type=TYPE)
            response.write_chunk(b"a")
            response.write_chunk(b"")
            response.write_chunk(b"b")
            response.end_stream()
            assert (await client.answer()).body == b"ab"

    run(test())


def test_http10_stream_has_no_chunks_and_ends_with_the_connection() -> None:
    async def test() -> None:
        desk = Desk()
        async with serving(desk) as server, Client.connect(server) as client:
            client.send(GET10)
            response = await desk.take()
            response.start_stream(content_type=TYPE)
            response.write_chunk(b"a")
            response.write_chunk(b"b")
            response.end_stream(b"c")
            answer = await client.answer()
            assert answer.body == b"abc"
            assert answer.headers["connection"] == "close" and "transfer-encoding" not in answer.headers

    run(test())


def test_head_of_a_stream_has_no_body_and_keeps_the_connection() -> None:
    async def test() -> None:
        desk = Desk()
        async with serving(desk) as server, Client.connect(server) as client:
            client.send(GET.replace(b"GET", b"HEAD"))
            response = await desk.take()
            response.start_stream(content_type=TYPE)
            response.write_chunk(b"a")
            response.end_stream(b"b")
            assert (await client.answer(head=True)).headers["content-type"] == TYPE
            client.send(GET)
            (await desk.take(1)).send(200, b"next")
            assert (await client.answer()).body == b"next"

    run(test())


def test_aborted_stream_sends_what_was_written_and_never_the_last_chunk() -> None:
    async def test() -> None:
        desk = Desk()
        async with serving(desk) as server, Client.connect(server) as client:
            client.send(GET + GET)
            response = await desk.take()
            response.start_stream(content_type=TYPE)
            response.write_chunk(b"data: {}\n\n")
            response.write_chunk(b"data: error\n\n")
            response.abort_stream()
            await client.head()
            chunks = client.chunks()
            assert await anext(chunks) == b"data: {}\n\n"
            assert await anext(chunks) == b"data: error\n\n"
            with pytest.raises(asyncio.IncompleteReadError):
                await anext(chunks)
            # Whoever aborts knows; and what waited behind is not begun.
            assert desk.num_disconnects == 0 and len(desk.requests) == 1
            await until(lambda: server.counters.connections_open == 0)

    run(test())


def test_aborted_http10_stream_is_reset_because_its_end_would_look_complete() -> None:
    async def test() -> None:
        desk = Desk()
        async with serving(desk) as server, Client.connect(server) as client:
            client.send(GET10)
            response = await desk.take()
            response.start_stream(content_type=TYPE)
            response.write_chunk(b"half")
            await client.head()
            response.abort_stream()
            with pytest.raises(ConnectionResetError):
                await client.reader.read()

    run(test())


def test_handler_that_raises_in_a_stream_cuts_it() -> None:
    def handler(request: Request, response: Response) -> None:
        response.start_stream(content_type=TYPE)
        response.write_chunk(b"half")
        raise StepFailedError("the device step failed")

    async def test() -> None:
        async with serving(handler) as server, Client.connect(server) as client:
            with pytest.raises(asyncio.IncompleteReadError):
                await client.ask(GET)

    run(test())


def test_long_stream_keeps_its_order_and_its_bytes() -> None:
    async def test() -> None:
        desk = Desk()
        async with serving(desk) as server, Client.connect(server) as client:
            client.send(GET)
            response = await desk.take()
            response.start_stream(content_type=TYPE)
            for index in range(20_000):
                response.write_chunk(b"data: %d\n\n" % index)
                if index % 100 == 0:
                    await asyncio.sleep(0)
            response.end_stream()
            answer = await client.answer()
            assert answer.body == b"".join(b"data: %d\n\n" % index for index in range(20_000))

    run(test())
