"""A client that goes away frees what it held within a step, streaming or not."""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from tests.e2e.serving import ServerProcess

LONG: dict[str, Any] = {
    "model": "demo",
    "messages": [{"role": "user", "content": "Count from 1 to 1000."}],
    "max_tokens": 4000,
    "ignore_eos": True,
}


def connect(server: ServerProcess, body: dict[str, Any], path: str = "/v1/chat/completions") -> socket.socket:
    """A connection with a request under way."""
    parts = urlsplit(server.url)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=60)
    data = json.dumps(body).encode()
    connection.sendall(
        b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (path.encode(), len(data), data)
    )
    return connection


def wait_until_running(server: ServerProcess, num_sequences: int) -> None:
    deadline = time.monotonic() + 30
    while server.metric("graphllm_running_sequences") < num_sequences:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stream_that_nobody_reads_any_more_holds_nothing(
    client: openai.OpenAI, server: ServerProcess
) -> None:
    fields = {name: value for name, value in LONG.items() if name != "ignore_eos"}
    with client.chat.completions.create(**fields, stream=True, extra_body={"ignore_eos": True}) as stream:
        for number, _ in enumerate(stream):
            if number == 5:
                break
        assert server.metric("graphllm_kv_blocks_held") > 0
        started = time.monotonic()
    server.wait_until_idle(timeout=5)
    # Far sooner than the 4000 tokens would take.
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("how", ["fin", "reset"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("n", [1, 3])
def test_a_closed_connection_frees_its_blocks(server: ServerProcess, stream: bool, how: str, n: int) -> None:
    with connect(server, {**LONG, "stream": stream, "n": n}) as connection:
        wait_until_running(server, n)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")
        if how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    server.wait_until_idle(timeout=5)


def test_every_prompt_of_a_batch_is_let_go(server: ServerProcess) -> None:
    body = {
        "model": "demo",
        "prompt": ["One two three", "The sky is", "A B C D"],
        "n": 2,
        "max_tokens": 4000,
        "ignore_eos": True,
        "stream": True,
    }
    with connect(server, body, "/v1/completions"):
        wait_until_running(server, 6)
    server.wait_until_idle(timeout=5)


def test_a_request_that_waits_behind_another_on_its_connection_never_starts(server: ServerProcess) -> None:
    before = server.metric("graphllm_requests_total")
    with connect(server, LONG) as connection:
        wait_until_running(server, 1)
        data = json.dumps(LONG).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: %d\r\n\r\n%b" % (len(data), data))
        time.sleep(0.2)
    server.wait_until_idle(timeout=5)
    assert server.metric("graphllm_requests_total") == before + 1


def test_the_others_are_not_disturbed(client: openai.OpenAI, server: ServerProcess) -> None:
    question = [{"role": "user", "content": "Count from 1 to 10."}]
    request: dict[str, Any] = {"model": "demo", "messages": question, "temperature": 0, "max_tokens": 32}
    text = ""
    with connect(server, {**LONG, "stream": True}):
        wait_until_running(server, 1)
        stream = client.chat.completions.create(**request, stream=True)
        text += next(iter(stream)).choices[0].delta.content or ""
    for chunk in stream:
        text += chunk.choices[0].delta.content or ""
    assert text == "1. 1\n2. 2\n3. 3\n4. 4\n5. 5\n6. 6\n7."


def test_metrics_count_connections_and_requests(server: ServerProcess) -> None:
    before = server.metric("graphllm_http_requests_total")
    server.get("/health")
    # The two requests for metrics count as well.
    assert server.metric("graphllm_http_requests_total") == before + 2
    assert server.metric("graphllm_http_connections_open") >= 1
