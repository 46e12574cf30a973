"""One connection over a real socket: order, framing, keep-alive, refusals, timeouts."""

from __future__ import annotations

import asyncio
import logging

import pytest

from graphllm.errors import ContextLengthError
from graphllm.server.http import Request, Response
from tests.server.http_client import GET, Client, Desk, echo, run, serving, until
from tests.server.test_http_request_parser import CORPUS, HOSTILE


def post(body: bytes, *lines: bytes) -> bytes:
    length = b"Content-Length: %d" % len(body)
    return b"\r\n".join([b"POST /p HTTP/1.1", b"Host: a", length, *lines]) + b"\r\n\r\n" + body


def test_every_cut_of_a_request_gets_the_same_answer() -> None:
    async def test() -> None:
        async with serving(echo) as server:
            for data in CORPUS:
                is_head, is_http10 = data.startswith(b"HEAD"), b"HTTP/1.0" in data
                async with Client.connect(server) as client:
                    whole = await client.ask(data, head=is_head)
                assert whole.status == 200
                for cut in range(1, len(data), 3):
                    async with Client.connect(server) as client:
                        num_before = server.counters.requests_total
                        client.send(data[:cut])
                        for _ in range(4):
                            await asyncio.sleep(0)
                        assert server.counters.requests_total == num_before
                        assert await client.ask(data[cut:], head=is_head) == whole
                        if not is_http10:
                            assert (await client.ask(GET)).status == 200

    run(test())


def test_refusals_are_openai_errors_and_end_the_connection() -> None:
    async def test() -> None:
        async with serving(echo) as server:
            for status, data in HOSTILE:
                async with Client.connect(server) as client:
                    answer = await client.ask(data)
                    assert answer.status == status, data
                    assert answer.headers["content-type"] == "application/json"
                    assert answer.headers["connection"] == "close"
                    assert answer.error["message"]
                    assert await client.at_end()
            assert server.counters.requests_total == 0
            assert server.counters.refused_total == len(HOSTILE)

    run(test())


def test_refused_head_request_gets_no_body() -> None:
    async def test() -> None:
        async with serving(echo) as server, Client.connect(server) as client:
            answer = await client.ask(b"HEAD / HTTP/1.1\r\n\r\n", head=True)
            assert answer.status == 400
            assert await client.at_end()

    run(test())


def test_connection_is_kept_alive_for_many_requests() -> None:
    async def test() -> None:
        async with serving(echo) as server, Client.connect(server) as client:
            for index in range(100):
                answer = await client.ask(post(b"%d" % index))
                assert (answer.status, answer.body) == (200, b"POST /p  %d" % index)
                assert "connection" not in answer.headers
            assert server.counters.connections_total == 1
            assert server.counters.requests_total == 100

    run(test())


def test_connection_close_is_honoured() -> None:
    async def test() -> None:
        async with serving(echo) as server, Client.connect(server) as client:
            answer = await client.ask(post(b"x", b"Connection: close") + GET)
            assert answer.headers["connection"] == "close"
            assert await client.at_end()

    run(test())


def test_http10_closes_unless_asked_to_keep_alive() -> None:
    async def test() -> None:
        async with serving(echo) as server, Client.connect(server) as client:
            answer = await client.ask(b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            assert answer.headers["connection"] == "keep-alive"
            answer = await client.ask(b"GET /b HTTP/1.0\r\n\r\n")
            assert answer.body == b"GET /b  "
            assert answer.headers["connection"] == "close"
            assert await client.at_end()

    run(test())


def test_head_has_the_length_and_no_body() -> None:
    async def test() -> None:
        async with serving(echo) as server, Client.connect(server) as client:
            answer = await client.ask(b"HEAD /abc HTTP/1.1\r\nHost: a\r\n\r\n", head=True)
            assert answer.headers["content-length"] == str(len(b"HEAD /abc  "))
            assert (await client.ask(GET)).body == b"GET /  "

    run(test())


@pytest.mark.parametrize("status", [204, 304])
def test_statuses_without_body_have_none(status: int) -> None:
    def handler(request: Request, response: Response) -> None:
        response.send(status, b"must not be sent")

    async def test() -> None:
        async with serving(handler) as server, Client.connect(server) as client:
            for _ in range(2):
                answer = await client.ask(GET)
                assert answer.status == status
                assert "content-length" not in answer.headers and "transfer-encoding" not in answer.headers

    run(test())


def test_header_values_cannot_end_their_line() -> None:
    def handler(request: Request, response: Response) -> None:
        response.send(200, b"", headers=(("X-Echo", "a\r\nX-Evil: b\0\U0001f600"),))

    async def test() -> None:
        async with serving(handler) as server, Client.connect(server) as client:
            answer = await client.ask(GET)
            assert answer.headers["x-echo"] == "a  X-Evil: b ?"
            assert "x-evil" not in answer.headers

    run(test())


def test_pipelined_requests_are_answered_in_order_and_one_at_a_time() -> None:
    async def test() -> None:
        desk = Desk()
        async with serving(desk) as server, Client.connect(server) as client:
            client.send(b"".join(post(b"%d" % index) for index in range(5)))
            for index in range(5):
                response = await desk.take(index)
                response.send(200, desk.requests[index].body)
                # Not even now: whoever answers is in the middle of something.
                assert len(desk.requests) == index + 1
            for index in range(5):
                assert (await client.answer()).body == b"%d" % index
            assert desk.num_disconnects == 0

    run(test())


@pytest.mark.parametrize("handler_is_quick", [True, False])
def test_thousand_pipelined_requests_are_bounded(handler_is_quick: bool) -> None:
    async def test() -> None:
        desk = Desk()
        async with serving(echo if handler_is_quick else desk) as server, Client.connect(server) as client:
            client.send(GET * 1000)
            for index in range(17):
                if not handler_is_quick:
                    (await desk.take(index)).send(200, b"")
                assert (await client.answer()).status == 200
            answer = await client.answer()
            assert (answer.status, answer.error["code"]) == (429, "too_many_pipelined_requests")
            assert await client.at_end()
            assert server.counters.requests_total == 17

    run(test())


def test_bodies_waiting_in_the_pipeline_are_bounded_together() -> None:
    async def test() -> None:
        desk = Desk()
        async with serving(desk, max_body_bytes=1000) as server, Client.connect(server) as client:
            client.send(post(b"x" * 1000))
            await desk.take()
            client.send(post(b"x" * 600) * 2)
            await asyncio.sleep(0.01)
            client.send(GET)
            for index in range(2):
                (await desk.take(index)).send(200, b"")
                assert (await client.answer()).status == 200
            assert (await client.answer()).status == 429
            assert await client.at_end()
            assert len(desk.requests) == 2

    run(test())


def test_malformed_request_is_answered_after_those_before_it() -> None:
    async def test() -> None:
        desk = Desk()
        async with serving(desk) as server, Client.connect(server) as client:
            client.send(GET + GET + b"nonsense\r\n\r\n" + GET)
            await desk.take()
            client.send(GET)
            await asyncio.sleep(0.01)
            for index in range(2):
                (await desk.take(index)).send(200, b"%d" % index)
                assert (await client.answer()).body == b"%d" % index
            assert (await client.answer()).status == 400
            assert await client.at_end()
            assert len(desk.requests) == 2 and server.counters.refused_total == 1

    run(test())


def test_oversized_body_is_refused_before_it_is_sent() -> None:
    async def test() -> None:
        async with serving(echo, max_body_bytes=1000) as server, Client.connect(server) as client:
            client.send(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 1001\r\n\r\n")
            status, _ = await client.head()
            assert status == 413

    run(test())


def test_refusal_reaches_a_client_that_is_still_sending() -> None:
    async def test() -> None:
        async with serving(echo, max_body_bytes=1000) as server, Client.connect(server) as client:
            client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 20000000\r\n\r\n")
            for _ in range(50):
                client.send(b"x" * 100_000)
                await asyncio.sleep(0)
            answer = await client.answer()
            assert (answer.status, answer.error["code"]) == (413, "payload_too_large")
            assert await client.at_end()

    run(test())


def test_lingering_connection_is_let_go_when_the_client_never_closes() -> None:
    async def test() -> None:
        async with serving(echo, linger_timeout=0.05) as server, Client.connect(server) as client:
            assert (await client.ask(b"nonsense\r\n\r\n")).status == 400
            assert server.counters.connections_open == 1
            await until(lambda: server.counters.connections_open == 0)

    run(test())


def test_continue_is_sent_when_the_client_waits_for_it() -> None:
    async def test() -> None:
        async with serving(echo) as server, Client.connect(server) as client:
            client.send(b"POST /p HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
            assert await client.head() == (100, {})
            assert (await client.ask(b"hi")).body == b"POST /p  hi"

    run(test())


def test_continue_waits_for_the_answers_before_it() -> None:
    async def test() -> None:
        desk = Desk()
        async with serving(desk, body_timeout=0.2) as server, Client.connect(server) as client:
            client.send(GET)
            first = await desk.take()
            first.start_stream(content_type="text/plain")
            client.send(b"POST /p HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
            await asyncio.sleep(0.3)  # longer than a body may take, but the wait is the server's
            first.end_stream(b"done")
            assert (await client.answer()).body == b"done"
            assert await client.head() == (100, {})
            await asyncio.sleep(0.05)
            client.send(b"hi")
            second = await desk.take(1)
            second.send(200, desk.requests[1].body)
            assert (await client.answer()).body == b"hi"

    run(test())


def test_handler_that_raises_is_answered_with_500_and_the_connection_lives(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def handler(request: Request, response: Response) -> None:
        if request.raw_path == b"/bug":
            raise ZeroDivisionError("the bug")
        if request.raw_path == b"/mistake":
            raise ContextLengthError("too long", param="messages")
        echo(request, response)

    async def test() -> None:
        async with serving(handler) as server, Client.connect(server) as client:
            answer = await client.ask(GET.replace(b"/ ", b"/bug "))
            assert answer.status == 500
            assert answer.error["type"] == "server_error" and "bug" not in answer.error["message"]
            answer = await client.ask(GET.replace(b"/ ", b"/mistake "))
            assert (answer.status, answer.error["param"]) == (400, "messages")
            assert (await client.ask(GET)).status == 200

    with caplog.at_level(logging.ERROR):
        run(test())
    assert "ZeroDivisionError: the bug" in caplog.text


def test_idle_connection_is_closed_silently_after_the_keep_alive_time() -> None:
    async def test() -> None:
        async with serving(echo, keep_alive_timeout=0.1) as server:
            async with Client.connect(server) as used, Client.connect(server) as unused:
                assert (await used.ask(GET)).status == 200
                assert await used.at_end()
                assert await unused.at_end()
            assert server.counters.refused_total == 0

    run(test())


@pytest.mark.parametrize(
    "start", [b"G", b"GET / HTTP/1.1\r\nHost:", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nab"]
)
def test_request_that_does_not_arrive_in_time_gets_408(start: bytes) -> None:
    async def test() -> None:
        timeouts = {"header_timeout": 0.05, "body_timeout": 0.05}
        async with serving(echo, **timeouts) as server, Client.connect(server) as client:
            assert (await client.ask(GET)).status == 200
            answer = await client.ask(start)
            assert (answer.status, answer.error["code"]) == (408, "request_timeout")
            assert await client.at_end()

    run(test())


def test_dripping_headers_do_not_extend_the_header_time() -> None:
    async def test() -> None:
        async with serving(echo, header_timeout=0.1) as server, Client.connect(server) as client:
            client.send(b"GET / HTTP/1.1\r\n")
            for index in range(100):
                client.send(b"X-%d: 1\r\n" % index)
                await asyncio.sleep(0.01)
                if server.counters.refused_total:
                    break
            assert (await client.answer()).status == 408

    run(test())


def test_body_at_the_minimum_rate_is_given_its_time_and_a_drip_is_not() -> None:
    async def upload(rate: int) -> int:
        timeouts = {"body_timeout": 0.1, "min_body_rate": 1000}
        async with serving(echo, **timeouts) as server, Client.connect(server) as client:
            client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (rate * 50))
            for _ in range(50):
                client.send(b"x" * rate)
                await asyncio.sleep(0.01)
                if server.counters.refused_total:
                    break
            return (await client.answer()).status

    async def test() -> None:
        assert await upload(rate=100) == 200  # ten times the minimum
        assert await upload(rate=1) == 408  # a tenth of it

    run(test())


def test_request_being_answered_has_no_reading_deadline() -> None:
    async def test() -> None:
        desk = Desk()
        timeouts = {"keep_alive_timeout": 0.05, "header_timeout": 0.05, "body_timeout": 0.05}
        async with serving(desk, **timeouts) as server, Client.connect(server) as client:
            client.send(post(b"x"))
            response = await desk.take()
            await asyncio.sleep(0.15)
            response.send(200, b"late")
            assert (await client.answer()).body == b"late"
            await asyncio.sleep(0.02)  # the connection is idle since the answer, not since the request
            client.send(post(b"y"))
            (await desk.take(1)).send(200, b"again")
            assert (await client.answer()).body == b"again"

    run(test())


def test_each_pipelined_request_has_its_own_reading_deadline() -> None:
    async def test() -> None:
        async with serving(echo, header_timeout=0.2) as server, Client.connect(server) as client:
            client.send(GET[:10])
            for _ in range(20):  # there is always half a request, never the same one for long
                await asyncio.sleep(0.02)
                assert (await client.ask(GET[10:] + GET[:10])).status == 200

    run(test())
