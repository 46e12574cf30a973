"""The load generator's client: events however the stream is cut, and nothing broken taken for an answer."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.sse_client import Endpoint, Exchange, LoadError, connect, read_completion, sse_events

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def data_of(*pieces: bytes) -> list[bytes]:
    return [data for _, data in sse_events([(0.0, piece) for piece in pieces])]


def chunk(content: str | None = None, **more: Any) -> bytes:
    event = {"choices": [{"index": 0, "delta": {"content": content}}], **more}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def exchange(*pieces: tuple[float, bytes], status: int = 200, start: float = 10.0) -> Exchange:
    return Exchange(start=start, status=status, pieces=list(pieces))


def test_events_are_the_data_between_blank_lines() -> None:
    assert data_of(b"data: a\n\ndata: b\n\n") == [b"a", b"b"]


def test_carriage_returns_comments_and_other_fields_are_no_data() -> None:
    assert data_of(b": ping\r\n\r\nevent: x\r\nid: 3\r\ndata:a\r\n\r\n") == [b"a"]


def test_several_data_lines_are_one_event() -> None:
    assert data_of(b"data: a\ndata:  b\ndata:\n\n") == [b"a\n b\n"]


def test_an_event_cut_off_by_the_end_is_left_out() -> None:
    assert data_of(b"data: a\n\ndata: b\n") == [b"a"]
    assert data_of(b"data: a\n\ndata: b") == [b"a"]


def test_an_event_has_the_time_of_its_last_byte() -> None:
    pieces = [(1.0, b"data: a\n"), (2.0, b"\ndata"), (3.0, b": b\n\ndata: c\n\n")]
    assert list(sse_events(pieces)) == [(2.0, b"a"), (3.0, b"b"), (3.0, b"c")]


@given(cuts=st.lists(st.integers(0, 60), max_size=8))
def test_where_the_stream_is_cut_makes_no_difference(cuts: list[int]) -> None:
    stream = b': hello\r\n\r\ndata: {"a": 1}\n\ndata: x\ndata: y\n\ndata: [DONE]\n\n'
    edges = [0, *sorted(cuts), len(stream)]
    pieces = [stream[start:end] for start, end in itertools.pairwise(edges)]
    assert data_of(*pieces) == data_of(stream) == [b'{"a": 1}', b"x\ny", b"[DONE]"]


def test_a_completion_has_the_times_of_its_texts_and_the_server_s_count() -> None:
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4}}\n\n'
    completion = read_completion(
        exchange(
            (10.5, chunk("")),
            (11.0, chunk("Hel")),
            (12.0, chunk("lo") + chunk("!")),
            (12.5, chunk(None)),
            (13.0, usage + b"data: [DONE]\n\n"),
        )
    )
    assert completion.start == 10.0
    assert completion.token_times == (11.0, 12.0, 12.0)
    assert completion.end == 13.0
    assert completion.num_tokens == 4
    assert completion.num_prompt_tokens == 7
    assert completion.text == "Hello!"


def test_without_the_server_s_count_events_are_counted() -> None:
    assert read_completion(exchange((11.0, chunk("a") + chunk("b") + b"data: [DONE]\n\n"))).num_tokens == 2


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (exchange((11.0, b'{"error": {}}'), status=400), 'HTTP 400: {"error"'),
        (exchange((11.0, chunk("a"))), r"without \[DONE\]"),
        (exchange((11.0, b"data: [DONE]\n\n")), "no text"),
        (exchange((11.0, chunk("a") + b'data: {"error": {"message": "gone"}}\n\n')), "broke off.*gone"),
    ],
)
def test_a_broken_answer_is_an_error(broken: Exchange, complaint: str) -> None:
    with pytest.raises(LoadError, match=complaint):
        read_completion(broken)


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://127.0.0.1:8000", Endpoint("127.0.0.1", 8000, "/v1/x")),
        ("http://127.0.0.1:8000/v1/", Endpoint("127.0.0.1", 8000, "/v1/x")),
        ("localhost:81", Endpoint("localhost", 81, "/v1/x")),
        ("http://host/base/v1", Endpoint("host", 80, "/base/v1/x")),
    ],
)
def test_an_address_may_end_in_v1(url: str, endpoint: Endpoint) -> None:
    assert Endpoint.parse(url, "/v1/x") == endpoint


def test_other_schemes_are_refused() -> None:
    with pytest.raises(ValueError, match="is not an http:// address"):
        Endpoint.parse("https://host", "/v1/x")


def test_a_request_has_its_length_and_its_key() -> None:
    request = Endpoint("h", 1, "/p", "secret").request(b"{}")
    assert request.startswith(b"POST /p HTTP/1.1\r\nHost: h:1\r\n")
    assert b"\r\nAuthorization: Bearer secret\r\n" in request
    assert request.endswith(b"\r\nContent-Length: 2\r\n\r\n{}")
    assert Endpoint("h", 1, "/p").request().startswith(b"GET /p HTTP/1.1\r\n")


def exchange_with(serve: Serve, count: int = 1) -> list[Exchange]:
    """`count` exchanges over one connection with a server on this loop."""

    async def run() -> list[Exchange]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            endpoint = Endpoint("127.0.0.1", server.sockets[0].getsockname()[1], "/")
            connection = await connect(endpoint)
            exchanges = [await connection.send(endpoint.request(b"{}")) for _ in range(count)]
            connection.close()
        return exchanges

    return asyncio.run(run())


async def read_request(reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    assert b"Content-Length: 2" in head
    assert await reader.readexactly(2) == b"{}"


def test_chunked_answers_are_read_over_one_kept_connection() -> None:
    num_connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        for _ in range(2):
            await read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for part in (b"data: a", b"\n\n", b"data: b\n\n"):
                writer.write(b"%x\r\n%b\r\n" % (len(part), part))
                await asyncio.sleep(0.005)
            writer.write(b"0\r\n\r\n")
        writer.close()

    exchanges = exchange_with(serve, count=2)
    assert num_connections == 1
    assert [e.status for e in exchanges] == [200, 200]
    assert [data for e in exchanges for _, data in sse_events(e.pieces)] == [b"a", b"b", b"a", b"b"]
    times = [when for e in exchanges for when, _ in e.pieces]
    assert times == sorted(times)
    assert times[-1] > times[0] > exchanges[0].start


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (b"", "cut in the middle"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", "cut in the middle"),
        (b"220 mail.example ESMTP\r\n\r\n", "not HTTP"),
    ],
)
def test_an_answer_that_is_cut_off_or_no_http_is_an_error(answer: bytes, complaint: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(answer)
        writer.close()

    with pytest.raises(LoadError, match=complaint):
        exchange_with(serve)
