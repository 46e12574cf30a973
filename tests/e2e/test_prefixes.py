"""The prefix cache as clients see it: cached tokens in the usage, the same answers, pinned prefixes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import Answer, ServerProcess, running_server

SYSTEM = {"role": "system", "content": "You answer in rhymes, and never twice with the same one. " * 8}
KEY = "secret"
AUTHORIZED = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[ServerProcess]:
    """One that checks every invariant of its memory after each step, with a pinned system prompt."""
    folder = tmp_path_factory.mktemp("prefix-server")
    prompt = folder / "system.txt"
    prompt.write_text(str(SYSTEM["content"]))
    arguments = ("--served-model-name", "tiny", "--kv-cache-memory-bytes", "64MB", "--debug-kv")
    keys = ("--api-key", KEY, "--pin-prefix", str(prompt))
    with running_server(folder, "--model", str(tiny_model), *arguments, *keys) as server:
        yield server
        assert server.get("/health").status == 200


def chat(server: ServerProcess, *messages: dict[str, Any], **fields: Any) -> Answer:
    body = {"model": "tiny", "messages": list(messages), "max_tokens": 4, "temperature": 0, **fields}
    return server.post("/v1/chat/completions", body, **AUTHORIZED)


def cached(answer: Answer) -> int:
    assert answer.status == 200, answer.body
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_the_first_user_pays_nothing_for_a_pinned_system_prompt(server: ServerProcess) -> None:
    before = server.metric("graphllm_prefix_cache_hits_total")
    num_cached = cached(chat(server, SYSTEM, user("Hi")))
    # A token a byte, in whole blocks of 16.
    assert num_cached >= len(str(SYSTEM["content"])) - 16
    assert server.metric("graphllm_prefix_cache_hits_total") == before + num_cached
    assert server.metric("graphllm_kv_blocks_pinned") == num_cached / 16


def test_cached_tokens_are_reported_on_both_routes_and_change_no_answer(server: ServerProcess) -> None:
    text = "The same long question, asked several times over. " * 4
    answers = [chat(server, user(text)) for _ in range(2)]
    assert [cached(answer) > 100 for answer in answers] == [False, True]
    prompt = {"model": "tiny", "prompt": text, "max_tokens": 4, "temperature": 0}
    completions = [server.post("/v1/completions", prompt, **AUTHORIZED) for _ in range(2)]
    assert [cached(answer) > 100 for answer in completions] == [False, True]
    for first, second in (answers, completions):
        assert first.json()["choices"] == second.json()["choices"]


def test_another_salt_shares_nothing_and_an_empty_one_is_refused(server: ServerProcess) -> None:
    text = "A question that only its owner may have cached. " * 4
    salts = ["mine", "mine", "yours", None]
    found = [cached(chat(server, user(text), cache_salt=salt)) > 100 for salt in salts]
    assert found == [False, True, False, False]
    refused = chat(server, user(text), cache_salt="")
    assert (refused.status, refused.error["param"]) == (400, "cache_salt")
    refused = chat(server, user(text), cache_salt=5)
    assert (refused.status, refused.error["param"]) == (400, "cache_salt")


def test_prefixes_are_pinned_listed_and_unpinned(server: ServerProcess) -> None:
    (at_start,) = server.get("/admin/prefixes", **AUTHORIZED).json()["data"]
    messages = [{"role": "system", "content": "Quite another system prompt, that is long enough. " * 3}]
    answer = server.post("/admin/prefixes", {"messages": messages}, **AUTHORIZED)
    assert answer.status == 200, answer.body
    pinned = answer.json()
    assert pinned["object"] == "pinned_prefix" and pinned["num_tokens"] == 16 * pinned["num_blocks"]
    assert cached(chat(server, *messages, user("Hi"))) == pinned["num_tokens"]
    data = server.get("/admin/prefixes", **AUTHORIZED).json()["data"]
    assert data == [at_start, pinned]
    path = f"/admin/prefixes/{pinned['id']}"
    assert server.request("DELETE", path, **AUTHORIZED).json() == {
        "id": pinned["id"],
        "object": "pinned_prefix",
        "deleted": True,
    }
    assert server.request("DELETE", path, **AUTHORIZED).status == 404
    assert server.get("/admin/prefixes", **AUTHORIZED).json()["data"] == [at_start]


@pytest.mark.parametrize("prompt", ["A plain text that is to stay. " * 3, list(range(64))])
def test_a_text_or_token_ids_can_be_pinned(server: ServerProcess, prompt: Any) -> None:
    pinned = server.post("/admin/prefixes", {"prompt": prompt}, **AUTHORIZED).json()
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 1}
    assert cached(server.post("/v1/completions", body, **AUTHORIZED)) >= pinned["num_tokens"] - 16
    server.request("DELETE", f"/admin/prefixes/{pinned['id']}", **AUTHORIZED)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a" * 40, "messages": [{"role": "user", "content": "b"}]}, "prompt"),
        ({"prompt": ["a" * 40, "b" * 40]}, "prompt"),
        ({"prompt": "short"}, "prompt"),
        ({"prompt": "a" * 9000}, "prompt"),
        ({"prompt": "a" * 40, "cache_salt": ""}, "cache_salt"),
        ({"prompt": "a" * 40, "pin": True}, "pin"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "a" * 9000}]}, "messages"),
    ],
)
def test_what_cannot_be_pinned_is_a_clear_400(server: ServerProcess, body: Any, param: str) -> None:
    answer = server.post("/admin/prefixes", body, **AUTHORIZED)
    assert (answer.status, answer.error["param"]) == (400, param)


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_admin_routes_need_the_key(server: ServerProcess, method: str) -> None:
    path = "/admin/prefixes/x" if method == "DELETE" else "/admin/prefixes"
    assert server.request(method, path, {} if method == "POST" else None).status == 401


def test_a_page_in_a_browser_cannot_pin_as_a_simple_request(server: ServerProcess) -> None:
    with contextlib.closing(server.connect()) as connection:  # no Content-Type, as a page's typeless Blob
        connection.request("POST", "/admin/prefixes", json.dumps({"prompt": "a" * 64}), AUTHORIZED)
        answer = connection.getresponse()
        assert answer.status == 400
        assert "Content-Type" in json.loads(answer.read())["error"]["message"]
