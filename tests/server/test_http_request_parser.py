"""The parser alone: bytes in, requests or an error out, however the bytes are cut."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphllm.server.http import HttpLimits, Request
from graphllm.server.request_parser import ReadPhase, RequestParser

LIMITS = HttpLimits()

CORPUS = [
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\r\nGET /v1/models?x=1&y=%20 HTTP/1.1\r\nHost: localhost:8000\r\nAccept: */*\r\nX-Empty:\r\n\r\n",
    b"HEAD /health HTTP/1.0\r\n\r\n",
    b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 11\r\n\r\n" + b'{"a": "b c"',
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n4;x=y\r\ndefg\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked \r\n\r\n"
    b"1\r\na\r\n0\r\nT-One: 1\r\nT_Two: 2\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nhi",
    b"POST /u HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAMAAABkAAQBAAAAAAIAAAAA\r\nContent-Length: 4\r\n\r\nbody",
    b"POST /u HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    b"GET /u HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"GET http://proxy.example:80/p?q HTTP/1.1\r\nHost: proxy.example\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: [::1]:8000\r\n\r\n",
]

Seen = tuple[list[Any], tuple[int, str] | None]


def parse(*parts: bytes, limits: HttpLimits = LIMITS) -> tuple[list[Request], RequestParser]:
    parser = RequestParser(limits)
    requests = [request for part in parts for request in parser.feed(part, room=10_000)]
    return requests, parser


def seen(*parts: bytes) -> Seen:
    """What a connection would see, in a form that compares."""
    requests, parser = parse(*parts)
    fields = [
        (r.method, r.raw_path, r.query, r.http_version, list(r.headers), r.body, r.keep_alive)
        for r in requests
    ]
    return fields, None if parser.error is None else (parser.error.status, parser.error.message)


def single_bytes(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


@pytest.mark.parametrize("data", CORPUS)
def test_request_reads_the_same_wherever_it_is_cut(data: bytes) -> None:
    whole = seen(data)
    assert len(whole[0]) == 1 and whole[1] is None
    assert seen(*single_bytes(data)) == whole
    for cut in range(1, len(data)):
        assert seen(data[:cut], data[cut:]) == whole


def test_pipelined_corpus_reads_the_same_wherever_it_is_cut() -> None:
    # The one request that ends its connection comes last.
    data = b"".join([entry for entry in CORPUS if not entry.startswith(b"HEAD")] + [CORPUS[2]])
    whole = seen(data)
    assert len(whole[0]) == len(CORPUS) and whole[1] is None
    assert seen(*single_bytes(data)) == whole
    for cut in range(1, len(data)):
        assert seen(data[:cut], data[cut:]) == whole


def test_mutated_requests_read_the_same_in_one_piece_and_in_many() -> None:
    rng = random.Random(7)
    for _ in range(3000):
        data = bytearray(b"".join(rng.sample(CORPUS, 2)))
        for _ in range(rng.randint(1, 4)):
            spot = rng.randrange(len(data))
            data[spot : spot + rng.randint(0, 2)] = rng.choice(
                [b"", b"\r\n", b"\n", b"\0", b" ", b":", b"_", b",", b"%", b"\xff", b"9", b"Host: b\r\n"]
            )
        cuts = sorted(rng.sample(range(len(data)), 5))
        parts = [bytes(data[a:b]) for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        assert seen(*parts) == seen(bytes(data)), bytes(data)


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8), st.lists(st.integers(0, 10_000), max_size=6))
@settings(max_examples=200, deadline=None)
def test_chunked_body_is_its_chunks_joined_however_it_is_cut(chunks: list[bytes], cuts: list[int]) -> None:
    data = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    data += b"".join(b"%X\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    spots = sorted({cut % len(data) for cut in cuts})
    parts = [data[a:b] for a, b in zip([0, *spots], [*spots, len(data)], strict=True)]
    requests, parser = parse(*parts)
    assert parser.error is None
    assert [request.body for request in requests] == [b"".join(chunks)]


def request_with(*lines: bytes, first: bytes = b"POST / HTTP/1.1", body: bytes = b"") -> bytes:
    return b"\r\n".join([first, *lines]) + b"\r\n\r\n" + body


HOST = b"Host: a"

HOSTILE = [
    # Host
    (400, request_with()),
    (400, request_with(HOST, b"Host: b")),
    (400, request_with(HOST, HOST)),
    (400, request_with(b"Host: ")),
    (400, request_with(b"Host: a, b")),
    (400, request_with(b"Host: a b")),
    (400, request_with(b"Host: user@a")),
    (400, request_with(b"Host: a/b")),
    (400, request_with(b"Host: a:http")),
    (400, request_with(b"Host: [::1")),
    (400, request_with(b"Host: a, b", first=b"GET / HTTP/1.0")),
    # Request lines
    (505, request_with(HOST, first=b"GET / HTTP/2.0")),
    (505, request_with(HOST, first=b"GET / HTTP/0.9")),
    (505, b"GET /\r\n\r\n"),
    (505, request_with(HOST, first=b"GET /x RTSP/1.0")),
    (505, request_with(HOST, first=b"OPTIONS /x RTSP/1.0")),
    (501, request_with(HOST, first=b"PROPFIND / HTTP/1.1")),
    (501, request_with(HOST, first=b"TRACE / HTTP/1.1")),
    (501, request_with(HOST, first=b"CONNECT a:443 HTTP/1.1")),
    (505, request_with(HOST, first=b"SOURCE /x ICE/1.0")),
    (505, request_with(HOST, first=b"DESCRIBE rtsp://x RTSP/1.0")),
    (400, request_with(HOST, first=b"GET / HTTP/1.2")),
    (400, request_with(HOST, first=b"HELLO / HTTP/1.1")),
    (400, request_with(HOST, first=b"get / HTTP/1.1")),
    (400, request_with(HOST, first=b"GET /a#b HTTP/1.1")),
    (400, request_with(HOST, first=b"GET ftp://a/b HTTP/1.1")),
    (400, request_with(HOST, first=b"GET http://u@a/b HTTP/1.1")),
    (400, request_with(HOST, first=b"GET http:///b HTTP/1.1")),
    (400, request_with(HOST, first=b"GET /\xff HTTP/1.1")),
    (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    # Header lines
    (400, request_with(HOST, b"X_Y: 1")),
    (400, request_with(HOST, b"X : 1")),
    (400, request_with(HOST, b"X: 1\0")),
    (400, request_with(HOST, b"X: 1", b" folded")),
    (400, b"GET / HTTP/1.1\nHost: a\n\n"),
    # Framing
    (
        400,
        request_with(HOST, b"Content-Length: 1", b"Transfer-Encoding: chunked", body=b"1\r\na\r\n0\r\n\r\n"),
    ),
    (400, request_with(HOST, b"Content-Length: 1", b"Content-Length: 2", body=b"a")),
    (400, request_with(HOST, b"Content-Length: 1, 1", body=b"a")),
    (400, request_with(HOST, b"Content-Length: -1")),
    (400, request_with(HOST, b"Content-Length: 99999999999999999999999")),
    (400, request_with(HOST, b"Content-Length: " + b"0" * 5000 + b"1", body=b"a")),
    (400, request_with(HOST, b"Transfer-Encoding: chunked, chunked", body=b"0\r\n\r\n")),
    (
        400,
        request_with(HOST, b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
    ),
    (400, request_with(HOST, b"Transfer-Encoding: chunked", first=b"POST / HTTP/1.0", body=b"0\r\n\r\n")),
    (501, request_with(HOST, b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n")),
    (501, request_with(HOST, b"Transfer-Encoding: gzip")),
    (501, request_with(HOST, b"Transfer-Encoding: identity")),
    (400, request_with(HOST, b"Transfer-Encoding: chunked", body=b"0x1\r\na\r\n0\r\n\r\n")),
    (400, request_with(HOST, b"Transfer-Encoding: chunked", body=b"1\r\nab\r\n0\r\n\r\n")),
    (400, request_with(HOST, b"Transfer-Encoding: chunked", body=b"0\r\nContent-Length: 5\r\n\r\n")),
    (413, request_with(HOST, b"Content-Length: 33554433")),
    (413, request_with(HOST, b"Content-Length: 33554433", b"Expect: 100-continue")),
    (417, request_with(HOST, b"Content-Length: 1", b"Expect: 200-ok")),
    # An offered upgrade is no way around any check.
    (400, request_with(b"Connection: Upgrade", b"Upgrade: h2c")),
    (501, request_with(HOST, b"Connection: Upgrade", b"Upgrade: h2c", b"Transfer-Encoding: gzip, chunked")),
    (505, request_with(HOST, b"Connection: Upgrade", b"Upgrade: h2c", first=b"GET / RTSP/1.0")),
    # Sizes
    (414, request_with(HOST, first=b"GET /" + b"a" * 8192 + b" HTTP/1.1")),
    (431, request_with(HOST, *[b"X: 1"] * 100)),
    (431, request_with(HOST, *[b"X: " + b"a" * 10_000] * 7)),
]


@pytest.mark.parametrize(("status", "data"), HOSTILE)
def test_hostile_request_is_refused_wherever_it_is_cut(status: int, data: bytes) -> None:
    requests, parser = parse(data)
    assert requests == []
    assert parser.error is not None and parser.error.status == status
    assert parser.phase is ReadPhase.CLOSED
    for cut in range(1, len(data), max(1, len(data) // 200)):
        requests, parser = parse(data[:cut], data[cut:])
        assert requests == []
        assert parser.error is not None and parser.error.status == status


def test_requests_before_a_malformed_one_are_kept() -> None:
    requests, parser = parse(CORPUS[0] + CORPUS[4] + b"nonsense\r\n\r\n" + CORPUS[0])
    assert [request.method for request in requests] == ["GET", "POST"]
    assert parser.error is not None and parser.error.status == 400
    assert parser.feed(CORPUS[0], room=10) == []


def test_upgrade_is_not_accepted_and_the_body_is_read() -> None:
    (request,), parser = parse(CORPUS[8])
    assert request.body == b"body"
    assert "upgrade" not in request.headers
    assert request.headers.get("http2-settings") == "AAMAAABkAAQBAAAAAAIAAAAA"
    assert parser.phase is ReadPhase.IDLE


def test_trailers_are_not_headers_of_this_request_nor_of_the_next() -> None:
    requests, _ = parse(CORPUS[6] + CORPUS[0])
    assert [dict(request.headers) for request in requests] == [
        {"host": "a", "transfer-encoding": "Chunked"},
        {"host": "a"},
    ]


def test_repeated_headers_are_joined_and_names_have_no_case() -> None:
    (request,), _ = parse(request_with(HOST, b"Accept: a", b"ACCEPT: b", first=b"GET / HTTP/1.1"))
    assert request.headers.get("aCCept") == "a, b"
    assert request.headers.get("missing") is None and request.headers.get("missing", "x") == "x"


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"/a%2Fb?c?d", b"/a%2Fb", b"c?d"),
        (b"//a/b", b"//a/b", b""),
        (b"http://a", b"/", b""),
        (b"http://a?q", b"/", b"q"),
        (b"HTTPS://a:1/b?q", b"/b", b"q"),
    ],
)
def test_target_is_split_into_path_and_query(target: bytes, path: bytes, query: bytes) -> None:
    (request,), _ = parse(request_with(HOST, first=b"GET " + target + b" HTTP/1.1"))
    assert (request.raw_path, request.query) == (path, query)


def test_body_of_exactly_the_limit_is_accepted_and_one_byte_more_is_not() -> None:
    limits = HttpLimits(max_body_bytes=10)
    for framing, extra in (
        ([b"Content-Length: 10"], b""),
        ([b"Transfer-Encoding: chunked"], b"\r\n0\r\n\r\n"),
    ):
        prefix = b"" if not extra else b"a\r\n"
        (request,), parser = parse(
            request_with(HOST, *framing, body=prefix + b"x" * 10 + extra), limits=limits
        )
        assert request.body == b"x" * 10 and parser.error is None
    requests, parser = parse(
        request_with(HOST, b"Transfer-Encoding: chunked", body=b"b\r\n" + b"x" * 11 + b"\r\n0\r\n\r\n"),
        limits=limits,
    )
    assert requests == [] and parser.error is not None and parser.error.status == 413


ENDLESS = [
    (b"", b"\r\n" * 500),  # blank lines before a request
    (b"GET ", b"/" + b"a" * 999),
    (b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"a" * 1000),
    (b"GET / HTTP/1.1\r\nHost: a\r\n", b"X" * 1000),
    (b"GET / HTTP/1.1\r\nHost: a\r\nX:", b" " * 1000),
    (request_with(HOST, b"Transfer-Encoding: chunked", body=b"1;"), b"x" * 1000),
    (request_with(HOST, b"Transfer-Encoding: chunked", body=b"0\r\n"), b"T: 1\r\n" * 100),
    (request_with(HOST, b"Transfer-Encoding: chunked", body=b"0\r\nT: "), b"x" * 1000),
]


@pytest.mark.parametrize(("start", "rest"), ENDLESS)
def test_what_never_ends_is_given_up_within_the_header_limit(start: bytes, rest: bytes) -> None:
    parser = RequestParser(LIMITS)
    parser.feed(start, room=10)
    num_taken = 0
    while parser.error is None and num_taken <= LIMITS.max_header_bytes:
        parser.feed(rest, room=10)
        num_taken += len(rest)
    assert parser.error is not None and parser.error.status in (414, 431)


def test_request_beyond_the_room_is_an_error_and_those_within_are_kept() -> None:
    parser = RequestParser(LIMITS)
    requests = parser.feed(CORPUS[0] * 1000, room=17)
    assert len(requests) == 17
    assert parser.error is not None and parser.error.status == 429


def test_bytes_after_the_last_request_of_a_connection_are_not_read() -> None:
    requests, parser = parse(request_with(HOST, b"Connection: close") + b"\0 nonsense", b"more")
    assert [request.keep_alive for request in requests] == [False]
    assert parser.error is None and parser.phase is ReadPhase.CLOSED


def test_continue_is_awaited_only_until_the_body_comes() -> None:
    parser = RequestParser(LIMITS)
    parser.feed(request_with(HOST, b"Expect: 100-Continue", b"Content-Length: 2"), room=1)
    assert parser.awaits_continue and parser.phase is ReadPhase.BODY
    parser.feed(b"h", room=1)
    assert not parser.awaits_continue
    bodyless = RequestParser(LIMITS)
    assert len(bodyless.feed(request_with(HOST, b"Expect: 100-continue"), room=1)) == 1
    assert not bodyless.awaits_continue


def test_stray_blank_line_between_requests_begins_none() -> None:
    requests, parser = parse(CORPUS[0] + b"\r\n", b"\r\n")
    assert len(requests) == 1 and parser.phase is ReadPhase.IDLE
    assert len(parser.feed(CORPUS[0], room=1)) == 1


def test_large_body_in_many_pieces_is_read_whole() -> None:
    body = bytes(range(256)) * 4096
    pieces = [body[start : start + 1000] for start in range(0, len(body), 1000)]
    (request,), parser = parse(request_with(HOST, b"Content-Length: %d" % len(body)), *pieces)
    assert request.body == body and parser.error is None


def test_rtsp_is_refused_behind_an_http_request_for_the_same_target() -> None:
    requests, parser = parse(b"GET /x HTTP/1.1\r\nHo", b"st: a\r\n\r\n", b"GET /x RT", b"SP/1.0\r\n\r\n")
    assert len(requests) == 1
    assert parser.error is not None and parser.error.status == 505
