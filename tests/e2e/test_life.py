"""The process' life: it says when it cannot serve, drains on Ctrl-C, and exits with the right code."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from tests.e2e.serving import LISTENING, READY, ServerProcess, running_server

ENDLESS: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hi"}],
    "ignore_eos": True,
}


@pytest.fixture
def tiny_arguments(tiny_model: Path) -> tuple[str, ...]:
    return ("--model", str(tiny_model), "--served-model-name", "tiny", "--kv-cache-memory-bytes", "64MB")


def open_stream(server: ServerProcess, max_tokens: int) -> socket.socket:
    """A connection whose answer has begun."""
    body = json.dumps({**ENDLESS, "max_tokens": max_tokens, "stream": True}).encode()
    parts = urlsplit(server.url)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=60)
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    assert connection.recv(64).startswith(b"HTTP/1.1 200 OK")
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    received = b""
    while data := connection.recv(1 << 20):
        received += data
    return received


def test_a_loading_server_is_alive_and_not_ready_with_a_reason(tmp_path: Path) -> None:
    with running_server(tmp_path, until=LISTENING) as server:
        ready, health = server.get("/ready"), server.get("/health")
        assert READY.search(server.log) is None, "it loaded too fast for this test"
        assert ready.status == 503
        assert ready.json() == {"status": "loading", "reason": "The model is loading."}
        assert (health.status, health.json()) == (200, {"status": "loading"})
        refused = server.post("/v1/chat/completions", b"{}")
        assert (refused.status, refused.error["code"]) == (503, "engine_unavailable")
        assert refused.headers["retry-after"] == "1"
        assert server.get("/v1/models").status == 503
        assert server.get("/metrics").status == 200
        server.wait_for(READY)
        health, ready = server.get("/health"), server.get("/ready")
        assert (health.status, health.json()) == (200, {"status": "ok"})
        assert (ready.status, ready.json()) == (200, {"status": "ready"})


def test_ctrl_c_while_loading_exits_0(tmp_path: Path) -> None:
    with running_server(tmp_path, until=LISTENING) as server:
        server.interrupt()
        assert server.process.wait(timeout=20) == 0
        assert "Traceback" not in server.log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_without_work_exits_0_at_once(
    tmp_path: Path, tiny_arguments: tuple[str, ...], number: signal.Signals
) -> None:
    with running_server(tmp_path, *tiny_arguments) as server:
        server.process.send_signal(number)
        assert server.process.wait(timeout=10) == 0
        assert "Traceback" not in server.log and "WARNING" not in server.log


def test_ctrl_c_lets_running_streams_end_and_admits_no_more(
    tmp_path: Path, tiny_arguments: tuple[str, ...]
) -> None:
    with running_server(tmp_path, *tiny_arguments) as server, open_stream(server, 400) as connection:
        server.interrupt()
        server.wait_for(re.compile("draining 1 running"))
        ready, health = server.get("/ready"), server.get("/health")
        assert (ready.status, ready.json()["status"]) == (503, "draining")
        assert (health.status, health.json()) == (200, {"status": "draining"})
        refused = server.post("/v1/chat/completions", {**ENDLESS, "max_tokens": 2})
        assert (refused.status, refused.error["code"]) == (503, "engine_unavailable")
        received = read_to_end(connection)
        assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert received.count(b'"finish_reason":"length"') == 1
        assert server.process.wait(timeout=20) == 0


def test_a_second_ctrl_c_cuts_running_streams_as_errors(
    tmp_path: Path, tiny_arguments: tuple[str, ...]
) -> None:
    with running_server(tmp_path, *tiny_arguments) as server, open_stream(server, 8000) as connection:
        server.interrupt()
        server.wait_for(re.compile("draining 1 running"))
        server.interrupt()
        received = read_to_end(connection)
        assert b'data: {"error":' in received and b"shutting down" in received
        assert not received.endswith(b"0\r\n\r\n") and b"[DONE]" not in received
        assert server.process.wait(timeout=20) == 130


def test_the_drain_timeout_cuts_what_runs_too_long(tmp_path: Path, tiny_arguments: tuple[str, ...]) -> None:
    with (
        running_server(tmp_path, *tiny_arguments, "--drain-timeout", "0.3") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        fields = {name: value for name, value in ENDLESS.items() if name != "ignore_eos"}
        stream = client.chat.completions.create(
            **fields, max_tokens=8000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        server.interrupt()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert server.process.wait(timeout=20) == 0


def test_an_api_key_guards_v1_and_nothing_else(tmp_path: Path, tiny_arguments: tuple[str, ...]) -> None:
    with running_server(tmp_path, *tiny_arguments, "--api-key", "s3cret") as server:
        body = {**ENDLESS, "max_tokens": 1}
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "s3cret"},
            {"Authorization": "Bearer "},
            {"x_api_key": "wrong"},
            {"x_api_key": ""},
        ):
            refused = server.post("/v1/chat/completions", body, **headers)
            assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
        assert server.get("/v1/models").status == 401
        assert server.post("/v1/chat/completions", body, Authorization="Bearer s3cret").status == 200
        assert server.get("/v1/models", Authorization="bearer s3cret").status == 200
        assert server.get("/v1/models", x_api_key="s3cret").status == 200
        # Anthropic's clients read its form of errors, and send its header.
        refused = server.post("/v1/messages", {"model": "tiny"})
        assert refused.status == 401 and refused.json()["error"]["type"] == "authentication_error"
        assert refused.headers["request-id"] == refused.json()["request_id"]
        wrong = server.post("/v1/messages", {"model": "tiny"}, x_api_key="s3cret")
        assert wrong.status == 400 and wrong.json()["error"]["param"] == "messages"
        for answer, status in (
            (server.get("/v1/messages", x_api_key="s3cret"), 405),
            (server.post("/v1/messages/batches", {}, x_api_key="s3cret"), 404),
        ):
            assert answer.status == status and answer.json()["type"] == "error"
        assert server.get("/health").status == server.get("/metrics").status == 200


def test_a_model_id_with_slashes_works_raw_and_encoded(tmp_path: Path, tiny_model: Path) -> None:
    # Without --served-model-name the id is the --model value.
    arguments = ("--model", str(tiny_model), "--kv-cache-memory-bytes", "64MB")
    with running_server(tmp_path, *arguments) as server:
        name = str(tiny_model)
        assert name.count("/") > 1
        for path in (name, name.replace("/", "%2F"), name.replace("/", "%2f")):
            assert server.get(f"/v1/models/{path}").json()["id"] == name
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            assert client.models.retrieve(name).id == name


def test_a_taken_port_is_said_at_once(tmp_path: Path, tiny_arguments: tuple[str, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        started = time.monotonic()
        with (
            pytest.raises(AssertionError),
            running_server(tmp_path, *tiny_arguments, "--port", str(port)),
        ):
            pass
        assert time.monotonic() - started < 60
    assert f"127.0.0.1:{port}" in (tmp_path / "server.log").read_text()
