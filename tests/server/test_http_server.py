"""The server as a whole: listening, its limits on all clients together, and its end."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextlib import AsyncExitStack

import pytest

from graphllm.errors import StartupError
from graphllm.server.http import HttpServer, Request, Response
from tests.server.http_client import GET, Client, Desk, echo, run, serving, until


def test_taken_port_is_a_startup_error_that_names_it() -> None:
    async def test() -> None:
        async with serving(echo) as server:
            with pytest.raises(StartupError, match=str(server.port)):
                await HttpServer(echo).start("127.0.0.1", server.port)

    run(test())


def test_connection_above_the_limit_gets_503_and_a_freed_place_is_used_again() -> None:
    async def test() -> None:
        async with serving(echo, max_connections=3) as server, AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(Client.connect(server)) for _ in range(3)]
            for client in clients:
                assert (await client.ask(GET)).status == 200
            async with Client.connect(server) as refused:
                answer = await refused.ask(GET)
                assert (answer.status, answer.error["type"]) == (503, "service_unavailable")
                assert await refused.at_end()
                assert server.counters.connections_open == 3
                clients[0].writer.close()
                await until(lambda: server.counters.connections_open == 2)
                async with Client.connect(server) as accepted:
                    assert (await accepted.ask(GET)).status == 200

    run(test())


def test_refusals_themselves_are_limited() -> None:
    async def test() -> None:
        async with serving(echo, max_connections=2) as server, AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(Client.connect(server)) for _ in range(5)]
            for client in clients[:2]:
                assert (await client.ask(GET)).status == 200
            for client in clients[2:4]:
                assert (await client.answer()).status == 503
            assert await clients[4].at_end()

    run(test())


def test_closing_server_ends_idle_connections_at_once_and_accepts_no_more() -> None:
    async def test() -> None:
        async with serving(echo) as server, Client.connect(server) as client:
            assert (await client.ask(GET)).status == 200
            port = server.port
            started = asyncio.get_running_loop().time()
            await server.close(timeout=5)
            assert asyncio.get_running_loop().time() - started < 1
            assert await client.at_end()
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)

    run(test())


def test_closing_server_lets_answers_end_and_tells_the_clients_to_go() -> None:
    async def test() -> None:
        desk = Desk()
        async with (
            serving(desk) as server,
            Client.connect(server) as streaming,
            Client.connect(server) as waiting,
            Client.connect(server) as sending,
        ):
            streaming.send(GET)
            stream = await desk.take(0)
            stream.start_stream(content_type="text/plain")
            waiting.send(GET)
            await desk.take(1)
            sending.send(GET[:10])
            await until(lambda: server.counters.connections_open == 3)
            await asyncio.sleep(0.01)
            closing = asyncio.create_task(server.close(timeout=5))
            await asyncio.sleep(0.01)
            sending.send(GET[10:])
            (await desk.take(2)).send(200, b"c")
            desk.responses[1].send(200, b"b")
            stream.end_stream(b"a")
            assert (await streaming.answer()).body == b"a"
            for client, body in ((waiting, b"b"), (sending, b"c")):
                answer = await client.answer()
                assert (answer.body, answer.headers["connection"]) == (body, "close")
                assert await client.at_end()
            await closing
            assert desk.num_disconnects == 0 and server.counters.connections_open == 0

    run(test())


def test_connection_accepted_while_the_server_closes_gets_503() -> None:
    async def test() -> None:
        async with serving(echo) as server:
            server._state.is_draining = True  # as between the accept and the closing of the listener
            async with Client.connect(server) as client:
                assert (await client.answer()).status == 503
                assert await client.at_end()

    run(test())


def test_closing_server_cuts_what_does_not_end_in_time() -> None:
    async def test() -> None:
        desk = Desk()
        async with serving(desk) as server, Client.connect(server) as client:
            client.send(GET)
            response = await desk.take()
            response.start_stream(content_type="text/plain")
            await client.head()
            await server.close(timeout=0.05)
            assert desk.num_disconnects == 1 and server.counters.connections_open == 0
            with pytest.raises(asyncio.IncompleteReadError):
                _ = [chunk async for chunk in client.chunks()]

    run(test())


def test_many_clients_are_served_at_once() -> None:
    async def talk(server: HttpServer, name: int) -> None:
        async with Client.connect(server) as client:
            for index in range(20):
                answer = await client.ask(GET.replace(b"/ ", b"/%d/%d " % (name, index)))
                assert answer.body == b"GET /%d/%d  " % (name, index)

    async def test() -> None:
        async with serving(echo) as server:
            await asyncio.gather(*(talk(server, name) for name in range(50)))
            assert server.counters.requests_total == 1000
            assert server.counters.connections_total == 50
            await until(lambda: server.counters.connections_open == 0)

    run(test())


@pytest.mark.parametrize("ending", ["answered", "gone", "aborted", "refused"])
def test_nothing_of_a_request_is_left_for_the_garbage_collector(ending: str) -> None:
    seen: list[weakref.ref[object]] = []
    kept: list[Response] = []

    class Work:
        """Stands for what a handler keeps: it knows the response, and on_disconnect knows it."""

        def __init__(self, request: Request, response: Response) -> None:
            self.request, self.response = request, response
            request.on_disconnect = self.cancel
            seen.append(weakref.ref(self))

        def cancel(self) -> None:
            pass

    def handler(request: Request, response: Response) -> None:
        Work(request, response)
        kept.append(response)
        if ending == "answered":
            response.send(200, b"")
        if ending == "aborted":
            response.start_stream(content_type="text/plain")
            response.abort_stream()

    async def test() -> None:
        async with serving(handler) as server:
            async with Client.connect(server) as client:
                client.send(GET + (b"nonsense\r\n\r\n" if ending == "refused" else b""))
                await until(lambda: kept)
            await until(lambda: server.counters.connections_open == 0)
            kept.clear()
            assert [ref() for ref in seen] == [None]

    gc.disable()
    try:
        run(test())
    finally:
        gc.enable()
