"""Whatever a field holds: a 400 that names it, or an honest answer, and never anything else."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from graphllm.server.anthropic.protocol import CountTokensRequest, MessagesRequest
from graphllm.server.openai.responses.protocol import ResponsesRequest
from tests.server.bad_values import BadValue, bad_values, field_names
from tests.server.dialect_server import DialectServer

MESSAGES = [{"role": "user", "content": "Hi"}]
ROUTES: dict[str, tuple[type[msgspec.Struct], dict[str, Any]]] = {
    "/v1/responses": (ResponsesRequest, {"model": "tiny", "input": "Hi"}),
    "/v1/messages": (MessagesRequest, {"model": "tiny", "messages": MESSAGES, "max_tokens": 10}),
    "/v1/messages/count_tokens": (CountTokensRequest, {"model": "tiny", "messages": MESSAGES}),
}
CASES = [(route, name) for route, (body, _) in ROUTES.items() for name in field_names(body)]
# A name that is nobody's model, or nobody's response, is not found.
NOT_FOUND = ("model", "previous_response_id")


@pytest.mark.parametrize(("route", "name"), CASES)
def test_bad_value_is_refused_by_its_field(dialects: DialectServer, route: str, name: str) -> None:
    body_type, base = ROUTES[route]
    outcomes = [
        outcome(dialects, route, {**base, name: bad.value}, bad) for bad in bad_values(body_type, name)
    ]
    assert "refused" in outcomes


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b"{", b'{"a":' * 5000, b"\xff", b'{"model":"\\ud800"}']
)
def test_body_that_is_no_object_is_a_400(dialects: DialectServer, route: str, body: bytes) -> None:
    assert dialects.ask("POST", route, body).status == 400


@pytest.mark.parametrize("route", ROUTES)
def test_missing_field_is_named(dialects: DialectServer, route: str) -> None:
    _, base = ROUTES[route]
    for name in base:
        body = {key: value for key, value in base.items() if key != name}
        asked = dialects.ask("POST", route, body)
        assert asked.status == 400 and asked.json["error"]["param"] == name


def outcome(dialects: DialectServer, route: str, body: dict[str, Any], bad: BadValue) -> str:
    asked = dialects.ask("POST", route, body)
    if not asked.channel.writes:
        assert not bad.is_wrong_kind, bad
        return "being generated"
    if asked.status == 200:
        assert not bad.is_wrong_kind, bad
        return "answered"
    error = asked.json["error"]
    assert asked.status == 400 or (asked.status == 404 and bad.field in NOT_FOUND), (bad, error)
    assert error["type"] in ("invalid_request_error", "not_found_error")
    assert error["param"].partition("[")[0].partition(".")[0] == bad.field, (bad, error)
    return "refused"
