"""Bad input is a clear 4xx in the OpenAI form, and the next request is unharmed."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.e2e.serving import Answer, ServerProcess

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
GOOD = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "temperature": 0}


def chat_with(**fields: Any) -> bytes:
    return json.dumps({**GOOD, **fields}).encode()


def raw_with(field: bytes) -> bytes:
    return json.dumps(GOOD).encode()[:-1] + b", " + field + b"}"


def completion(prompt: Any, **fields: Any) -> bytes:
    return json.dumps({"model": "demo", "prompt": prompt, "max_tokens": 2, **fields}).encode()


def user(content: Any) -> bytes:
    return chat_with(messages=[{"role": "user", "content": content}])


BAD: dict[str, tuple[str, bytes, int, str | None]] = {
    "empty body": (CHAT, b"", 400, None),
    "malformed": (CHAT, b'{"model": "demo"', 400, None),
    "trailing garbage": (CHAT, chat_with() + b"}", 400, None),
    "not an object": (CHAT, b"[1]", 400, None),
    "not UTF-8": (CHAT, b'{"model": "\xff\xfe"}', 400, None),
    "NUL bytes": (CHAT, b"\x00" * 100, 400, None),
    "10,000 brackets": (CHAT, b"[" * 10_000, 400, None),
    "10,000 nested messages": (CHAT, b'{"messages":' + b"[" * 10_000 + b"]" * 10_000 + b"}", 400, None),
    "nested content": (CHAT, raw_with(b'"tools":' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000), 400, None),
    "NaN": (CHAT, raw_with(b'"top_p": NaN'), 400, None),
    "Infinity": (CHAT, raw_with(b'"top_p": Infinity'), 400, None),
    "1e400": (CHAT, raw_with(b'"top_p": 1e400'), 400, "top_p"),
    "negative": (CHAT, chat_with(max_tokens=-1), 400, "max_tokens"),
    "2**64": (CHAT, chat_with(max_tokens=2**64), 400, "max_tokens"),
    "2**64 n": (CHAT, chat_with(n=2**64), 400, "n"),
    "2**64 seed": (CHAT, chat_with(seed=2**64), 400, "seed"),
    "2**64 top_k": (CHAT, chat_with(top_k=-(2**64)), 400, "top_k"),
    "5,000 digits": (CHAT, raw_with(b'"seed": 1' + b"0" * 5_000), 400, "seed"),
    "lone surrogate": (CHAT, raw_with(b'"user": "\\ud800"'), 400, None),
    "lone surrogate in content": (
        CHAT,
        b'{"model":"demo","messages":[{"role":"user","content":"\\udfff"}]}',
        400,
        None,
    ),
    "wrong type": (CHAT, chat_with(temperature="hot"), 400, "temperature"),
    "wrong type of a message": (CHAT, chat_with(messages=[5]), 400, "messages[0]"),
    "wrong type of content": (CHAT, user(5), 400, "messages[0].content"),
    "unknown part": (
        CHAT,
        user([{"type": "image_url", "image_url": {}}]),
        400,
        "messages[0].content[0].type",
    ),
    "unknown role": (CHAT, chat_with(messages=[{"role": "x", "content": "y"}]), 400, "messages[0].role"),
    "no messages": (CHAT, b'{"model": "demo"}', 400, "messages"),
    "empty messages": (CHAT, chat_with(messages=[]), 400, "messages"),
    "no model": (CHAT, b'{"messages": [{"role": "user", "content": "Hi"}]}', 400, "model"),
    "unknown model": (CHAT, chat_with(model="other"), 404, "model"),
    "unknown field": (CHAT, chat_with(temprature=1), 400, "temprature"),
    "unsupported field": (CHAT, chat_with(tools=[{"type": "web_search"}]), 400, "tools[0].type"),
    "unsupported stream option": (
        CHAT,
        chat_with(stream=True, stream_options={"include_obfuscation": True}),
        400,
        "stream_options.include_obfuscation",
    ),
    "stream options without a stream": (CHAT, chat_with(stream_options={}), 400, "stream_options"),
    "too long": (CHAT, user("word " * 9_000), 400, "messages"),
    "far too long": (CHAT, user("x" * 20_000_000), 400, "messages"),
    "far too long, spaces": (CHAT, user(" " * 20_000_000), 400, "messages"),
    "bias of no token": (CHAT, chat_with(logit_bias={"49152": 1}), 400, "logit_bias"),
    "bias of a word": (CHAT, chat_with(logit_bias={"hello": 1}), 400, "logit_bias"),
    "stop token of no token": (CHAT, chat_with(stop_token_ids=[49152]), 400, "stop_token_ids"),
    "no prompt": (COMPLETIONS, b'{"model": "demo"}', 400, "prompt"),
    "null prompt": (COMPLETIONS, completion(None), 400, "prompt"),
    "empty prompt": (COMPLETIONS, completion(""), 400, "prompt"),
    "empty prompt list": (COMPLETIONS, completion([]), 400, "prompt"),
    "empty prompt in a list": (COMPLETIONS, completion(["a", ""]), 400, "prompt"),
    "empty token list in a list": (COMPLETIONS, completion([[1], []]), 400, "prompt"),
    "token id too large": (COMPLETIONS, completion([1, 49152]), 400, "prompt"),
    "token id negative": (COMPLETIONS, completion([-1]), 400, "prompt"),
    "token id 2**64": (COMPLETIONS, completion([2**64]), 400, "prompt"),
    "token id in a batch": (COMPLETIONS, completion([[1], [49152]]), 400, "prompt"),
    "mixed prompts": (COMPLETIONS, completion(["a", [1]]), 400, "prompt"),
    "mixed ids": (COMPLETIONS, completion([1, "a"]), 400, "prompt"),
    "too many prompts": (COMPLETIONS, completion(["a"] * 5_000), 400, "prompt"),
    "too many ids": (COMPLETIONS, completion([5] * 9_000), 400, "prompt"),
    "one prompt of two too long": (COMPLETIONS, completion([[5], [5] * 9_000]), 400, "prompt"),
    "output beyond the context": (COMPLETIONS, completion([5] * 8_000, max_tokens=500), 400, "max_tokens"),
    "echo": (COMPLETIONS, completion("a", echo=1), 400, "echo"),
    "suffix": (COMPLETIONS, completion("a", suffix="b"), 400, "suffix"),
    "best_of": (COMPLETIONS, completion("a", best_of=2), 400, "best_of"),
    "logprobs out of range": (COMPLETIONS, completion("a", logprobs=100), 400, "logprobs"),
    "body above the limit": (CHAT, user("x" * 33 * 1024**2), 413, None),
}


def assert_unharmed(server: ServerProcess) -> None:
    answer = server.post(CHAT, chat_with())
    assert answer.status == 200
    assert answer.json()["usage"]["completion_tokens"] == 2


def assert_error(answer: Answer, status: int, param: str | None) -> None:
    assert answer.status == status, answer.body[:500]
    assert answer.headers["content-type"].startswith("application/json")
    error = answer.error
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert 10 < len(error["message"]) < 500


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_4xx_that_names_the_field(server: ServerProcess, case: str) -> None:
    path, body, status, param = BAD[case]
    assert_error(server.post(path, body), status, param)
    assert_unharmed(server)


@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_stream_is_a_plain_error(server: ServerProcess, stream: bool) -> None:
    assert_error(server.post(CHAT, chat_with(stream=stream, n=0)), 400, "n")


def test_content_types(server: ServerProcess) -> None:
    for accepted in ("application/json", "application/json; charset=utf-8", "APPLICATION/JSON"):
        assert server.post(CHAT, chat_with(), Content_Type=accepted).status == 200
    for refused in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = server.post(CHAT, chat_with(), Content_Type=refused)
        assert_error(answer, 400, None)
        assert "Content-Type" in answer.error["message"]
    body = chat_with()
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=60) as connection:
        connection.sendall(
            b"POST %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
            % (CHAT.encode(), len(body), body)
        )
        received = b""
        while data := connection.recv(65536):
            received += data
    assert received.startswith(b"HTTP/1.1 200 ")


def test_unknown_routes_and_methods(server: ServerProcess) -> None:
    assert_error(server.get("/v1/nothing"), 404, None)
    assert_error(server.get(CHAT), 405, None)
    assert_error(server.post("/v1/models", b"{}"), 405, None)
    assert server.get("/v1/models/other").error["code"] == "model_not_found"


def test_duplicate_keys_last_wins(server: ServerProcess) -> None:
    answer = server.post(CHAT, raw_with(b'"max_tokens": 3'))
    assert answer.json()["usage"]["completion_tokens"] == 3
