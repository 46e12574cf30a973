"""Clients that leave, and clients that stay and do not read."""

from __future__ import annotations

import asyncio

import pytest

from graphllm.server.http import Request, Response
from tests.server.http_client import GET, Client, Desk, echo, run, serving, until


def use_in_every_way(response: Response) -> None:
    """What a step loop that has not heard yet would do to a response whose client is gone."""
    response.start_stream(content_type="text/event-stream")
    response.write_chunk(b"data")
    response.end_stream(b"more")
    response.send(200, b"body")
    response.abort_stream()
    assert not response.is_open and response.buffered_bytes == 0


@pytest.mark.parametrize("how", ["FIN", "RST", "half-close"])
@pytest.mark.parametrize("is_streaming", [True, False])
def test_client_that_leaves_is_noticed_once_and_writing_on_is_harmless(how: str, is_streaming: bool) -> None:
    async def test() -> None:
        desk = Desk()
        async with serving(desk) as server, Client.connect(server) as client:
            client.send(GET)
            response = await desk.take()
            channel = response._channel
            assert channel is not None
            if is_streaming:
                response.start_stream(content_type="text/event-stream")
                response.write_chunk(b"one")
                await client.head()
            if how == "FIN":
                client.writer.close()
            elif how == "RST":
                client.reset()
            else:
                client.writer.write_eof()
            await until(lambda: desk.requests[0].disconnected)
            assert desk.num_disconnects == 1
            use_in_every_way(response)
            await until(lambda: server.counters.connections_open == 0)
            channel.write(b"even past the response")
            channel.write_stream(b"even past the response")
            assert desk.num_disconnects == 1

    run(test())


def test_writing_in_the_same_pass_as_a_reset_never_raises() -> None:
    # The reset is found by the write, before the transport has reported it.
    async def test() -> None:
        desk = Desk()
        async with serving(desk) as server:
            for index in range(20):
                async with Client.connect(server) as client:
                    client.send(GET)
                    response = await desk.take(index)
                    response.start_stream(content_type="text/event-stream")
                    await client.head()
                    client.reset()
                    for _ in range(20):
                        response.write_chunk(b"x" * 100_000)
                        await asyncio.sleep(0)
            await until(lambda: desk.num_disconnects == 20)

    run(test())


def test_queued_requests_of_a_client_that_left_never_reach_the_handler() -> None:
    async def test() -> None:
        desk = Desk()
        async with serving(desk) as server, Client.connect(server) as client:
            client.send(GET * 5)
            response = await desk.take()
            client.writer.close()
            await until(lambda: server.counters.connections_open == 0)
            response.send(200, b"")
            await asyncio.sleep(0.01)
            assert len(desk.requests) == 1 and desk.num_disconnects == 1

    run(test())


def test_client_that_leaves_while_its_pipeline_is_full_is_noticed() -> None:
    async def test() -> None:
        desk = Desk()
        async with serving(desk) as server, Client.connect(server) as client:
            client.send(GET * 1000)
            await desk.take()
            client.send(GET * 1000)
            await asyncio.sleep(0.01)
            assert desk.num_disconnects == 0
            client.reset()
            await until(lambda: desk.num_disconnects == 1)

    run(test())


def test_client_that_leaves_after_its_answer_is_no_disconnect() -> None:
    async def test() -> None:
        desk = Desk()
        async with serving(desk) as server, Client.connect(server) as client:
            client.send(GET)
            (await desk.take()).send(200, b"")
            assert (await client.answer()).status == 200
            client.writer.close()
            await until(lambda: server.counters.connections_open == 0)
            assert desk.num_disconnects == 0
            assert not desk.requests[0].disconnected and desk.requests[0].on_disconnect is None

    run(test())


def test_client_that_leaves_before_its_request_is_complete_is_forgotten() -> None:
    async def test() -> None:
        async with serving(echo) as server, Client.connect(server) as client:
            client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc")
            await until(lambda: server.counters.connections_open == 1)
            client.writer.close()
            await until(lambda: server.counters.connections_open == 0)
            assert server.counters.requests_total == 0

    run(test())


def test_answer_given_at_once_reaches_a_client_that_closed_its_sending_side() -> None:
    async def test() -> None:
        async with serving(echo) as server, Client.connect(server) as client:
            client.send(GET)
            client.writer.write_eof()
            assert (await client.answer()).body == b"GET /  "
            assert await client.at_end()

    run(test())


def test_on_disconnect_that_raises_is_contained(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ZeroDivisionError("in on_disconnect")

    def handler(request: Request, response: Response) -> None:
        request.on_disconnect = fail

    async def test() -> None:
        async with serving(handler) as server:
            async with Client.connect(server) as client:
                client.send(GET)
                await until(lambda: server.counters.requests_total == 1)
            await until(lambda: server.counters.connections_open == 0)
            async with Client.connect(server) as client:
                client.send(GET)
                await until(lambda: server.counters.requests_total == 2)

    run(test())
    assert caplog.text.count("ZeroDivisionError: in on_disconnect") == 2


def test_stream_to_a_client_with_too_much_unread_is_cut() -> None:
    async def test() -> None:
        desk = Desk()
        async with (
            serving(desk, max_unread_bytes=1_000_000) as server,
            Client.connect(server, receive_buffer=4096) as client,
        ):
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            client.send(GET)
            response = await desk.take()
            response.start_stream(content_type="text/event-stream")
            num_written = 0
            while response.is_open:
                assert response.buffered_bytes <= 1_000_000 + 100_000
                response.write_chunk(b"x" * 100_000)
                num_written += 100_000
                await asyncio.sleep(0)
            assert num_written < 20_000_000
            assert desk.num_disconnects == 1 and desk.requests[0].disconnected
            assert server.counters.slow_clients_total == 1
            await until(lambda: server.counters.connections_open == 0)
            use_in_every_way(response)
            assert desk.num_disconnects == 1

    run(test())


def test_client_that_takes_nothing_for_too_long_is_cut() -> None:
    async def test() -> None:
        desk = Desk()
        async with (
            serving(desk, stall_timeout=0.1) as server,
            Client.connect(server, receive_buffer=4096) as client,
        ):
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            client.send(GET)
            response = await desk.take()
            response.start_stream(content_type="text/event-stream")
            for _ in range(60):
                response.write_chunk(b"x" * 100_000)
            assert response.buffered_bytes > 0
            await until(lambda: desk.num_disconnects == 1)
            assert server.counters.slow_clients_total == 1
            assert not response.is_open

    run(test())


def test_whole_answer_larger_than_the_unread_limit_reaches_a_slow_reader() -> None:
    body = bytes(range(256)) * 40_000

    def handler(request: Request, response: Response) -> None:
        response.send(200, body, content_type="application/octet-stream")

    async def test() -> None:
        limits = {"max_unread_bytes": 100_000, "stall_timeout": 0.3, "linger_timeout": 0.05}
        async with serving(handler, **limits) as server, Client.connect(server) as client:
            client.send(GET.replace(b"Host", b"Connection: close\r\nHost"))
            await client.head()
            received = b""
            while len(received) < len(body):
                received += await client.reader.readexactly(len(body) // 20)
                await asyncio.sleep(0.02)
            assert received == body
            assert await client.at_end()
            assert server.counters.slow_clients_total == 0

    run(test())


def test_client_that_pipelines_and_does_not_read_gets_no_more_requests_begun() -> None:
    def handler(request: Request, response: Response) -> None:
        response.send(200, b"x" * 6_000_000)

    async def test() -> None:
        async with (
            serving(handler, stall_timeout=0.2) as server,
            Client.connect(server, receive_buffer=4096) as client,
        ):
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            client.send(GET * 10)
            await until(lambda: server.counters.slow_clients_total == 1)
            assert server.counters.requests_total == 1

    run(test())


def test_pipeline_goes_on_when_a_slow_client_has_caught_up() -> None:
    def handler(request: Request, response: Response) -> None:
        response.send(200, b"x" * 6_000_000)

    async def test() -> None:
        async with serving(handler) as server, Client.connect(server) as client:
            client.send(GET * 3)
            for _ in range(3):
                assert len((await client.answer()).body) == 6_000_000

    run(test())


def test_client_that_leaves_with_much_unread_is_noticed_at_once() -> None:
    async def test() -> None:
        desk = Desk()
        async with serving(desk) as server, Client.connect(server, receive_buffer=4096) as client:
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            client.send(GET)
            response = await desk.take()
            response.start_stream(content_type="text/event-stream")
            for _ in range(60):
                response.write_chunk(b"x" * 100_000)
            assert response.buffered_bytes > 0
            client.writer.write_eof()
            await until(lambda: desk.num_disconnects == 1)

    run(test())
