"""/v1/responses/{id}: what is found, listed, cancelled and deleted, and what queries may say."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.dialect_server import DialectServer


def create(dialects: DialectServer, text: str = "Hi", **fields: Any) -> str:
    asked = dialects.ask("POST", "/v1/responses", {"model": "tiny", "input": text, **fields})
    dialects.say(f"Answer to {text}")
    response_id: str = asked.json["id"]
    return response_id


def texts(dialects: DialectServer, response_id: str, query: str = "") -> list[str]:
    asked = dialects.ask("GET", f"/v1/responses/{response_id}/input_items{query}")
    assert asked.status == 200, asked.json
    return [item["content"][0]["text"] for item in asked.json["data"]]


def test_input_is_listed_newest_first_with_the_turns_before_it(dialects: DialectServer) -> None:
    first = create(dialects, "one")
    second = create(dialects, "two", previous_response_id=first)
    assert texts(dialects, first) == ["one"]
    assert texts(dialects, second) == ["two", "Answer to one", "one"]
    assert texts(dialects, second, "?order=asc") == ["one", "Answer to one", "two"]


def test_input_is_paged(dialects: DialectServer) -> None:
    items = [{"role": "user", "content": str(number)} for number in range(25)]
    asked = dialects.ask("POST", "/v1/responses", {"model": "tiny", "input": items})
    dialects.say("done")
    path = f"/v1/responses/{asked.json['id']}/input_items?order=asc"
    page = dialects.ask("GET", path).json
    assert len(page["data"]) == 20 and page["has_more"] is True and page["object"] == "list"
    assert page["first_id"] == page["data"][0]["id"] and page["last_id"] == page["data"][-1]["id"]
    rest = dialects.ask("GET", f"{path}&limit=5&after={page['last_id']}").json
    assert [item["content"][0]["text"] for item in rest["data"]] == ["20", "21", "22", "23", "24"]
    assert rest["has_more"] is False
    empty = dialects.ask("GET", f"{path}&after={rest['last_id']}").json
    assert (empty["data"], empty["first_id"], empty["last_id"]) == ([], None, None)
    assert len({item["id"] for item in page["data"] + rest["data"]}) == 25


def test_deleted_response_is_gone_and_says_so(dialects: DialectServer) -> None:
    response_id = create(dialects)
    deleted = dialects.ask("DELETE", f"/v1/responses/{response_id}")
    assert deleted.json == {"id": response_id, "object": "response", "deleted": True}
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
        asked = dialects.ask(method, f"/v1/responses/{response_id}{path}")
        assert asked.status == 404 and "was deleted" in asked.json["error"]["message"]


def test_running_response_that_is_deleted_stops(dialects: DialectServer) -> None:
    body = {"model": "tiny", "input": "Hi", "background": True}
    response_id = dialects.ask("POST", "/v1/responses", body).json["id"]
    assert dialects.ask("DELETE", f"/v1/responses/{response_id}").status == 200
    assert dialects.engine.aborted == [response_id]
    dialects.say("too late")  # what was on its way brings nothing back
    assert len(dialects.store) == 0 and dialects.store.num_bytes == 0


def test_cancelling_needs_a_background_response(dialects: DialectServer) -> None:
    response_id = create(dialects)
    asked = dialects.ask("POST", f"/v1/responses/{response_id}/cancel", b"{}")
    assert asked.status == 400 and "background" in asked.json["error"]["message"]


def test_cancelling_one_that_has_ended_answers_with_it(dialects: DialectServer) -> None:
    body = {"model": "tiny", "input": "Hi", "background": True}
    response_id = dialects.ask("POST", "/v1/responses", body).json["id"]
    dialects.say("done")
    cancelled = dialects.ask("POST", f"/v1/responses/{response_id}/cancel").json
    assert cancelled["status"] == "completed" and dialects.engine.aborted == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "resp_x"),
        ("GET", "resp_x/output"),
        ("POST", "resp_x/cancel"),
        ("POST", "resp_x/stop"),
        ("DELETE", "x/y"),
    ],
)
def test_unknown_responses_and_paths_are_not_found(dialects: DialectServer, method: str, path: str) -> None:
    assert dialects.ask(method, f"/v1/responses/{path}").status == 404


QUERIES: dict[str, tuple[str, str | None]] = {
    "nothing": ("", None),
    "what a client sends": ("?include[]=message.output_text.logprobs&stream=false", None),
    "several includes": ("?include=reasoning.encrypted_content&include=file_search_call.results", None),
    "an unknown name": ("?verbose=1", "verbose"),
    "an unknown include": ("?include[]=everything", "include"),
    "a value twice": ("?stream=false&stream=false", "stream"),
    "no boolean": ("?stream=yes", "stream"),
    "a stream that is not kept": ("?stream=true", "stream"),
    "a number without a stream": ("?starting_after=3", "starting_after"),
    "padding": ("?include_obfuscation=true", "include_obfuscation"),
    "too many names": ("?" + "&".join(f"a{i}=1" for i in range(40)), None),
    "no UTF-8": ("?stream=%ff", "stream"),
}


@pytest.mark.parametrize(("query", "param"), QUERIES.values(), ids=QUERIES)
def test_query_is_understood_or_refused_by_name(
    dialects: DialectServer, query: str, param: str | None
) -> None:
    asked = dialects.ask("GET", f"/v1/responses/{create(dialects)}{query}")
    is_refused = param is not None or query.count("&") > 32
    assert asked.status == (400 if is_refused else 200)
    if is_refused:
        assert asked.json["error"]["param"] == param


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("?limit=0", "limit"),
        ("?limit=101", "limit"),
        ("?limit=x", "limit"),
        ("?limit=" + "9" * 5000, "limit"),
        ("?limit=-1", "limit"),
        ("?order=up", "order"),
        ("?after=msg_x", "after"),
        ("?before=msg_x", "before"),
    ],
)
def test_wrong_list_query_is_refused_by_name(dialects: DialectServer, query: str, param: str) -> None:
    asked = dialects.ask("GET", f"/v1/responses/{create(dialects)}/input_items{query}")
    assert asked.status == 400 and asked.json["error"]["param"] == param


@pytest.mark.parametrize("number", ["x", "-1", "9" * 12, "1.5", ""])
def test_wrong_starting_point_is_refused(dialects: DialectServer, number: str) -> None:
    body = {"model": "tiny", "input": "Hi", "background": True, "stream": True}
    asked = dialects.ask("POST", "/v1/responses", body)
    dialects.say("done")
    response_id = asked.events[0][1]["response"]["id"]
    refused = dialects.ask("GET", f"/v1/responses/{response_id}?stream=true&starting_after={number}")
    assert refused.status == 400 and refused.json["error"]["param"] == "starting_after"
