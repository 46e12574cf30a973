"""Whatever a field of a chat or a completion holds: a 400 that names it, or an answer, by a real engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import inspect

from graphllm.server.openai.chat_protocol import ChatCompletionRequest
from graphllm.server.openai.classification import ClassifyRequest
from graphllm.server.openai.completion_protocol import CompletionRequest
from graphllm.server.openai.embeddings import EmbeddingRequest
from graphllm.server.openai.rerank import RerankRequest
from graphllm.server.openai.scores import ScoreRequest
from graphllm.server.openai.tokenization import DetokenizeRequest, TokenizeRequest
from tests.pooled_models import write_model
from tests.server.bad_values import VALUES, BadValue, bad_values, field_names
from tests.server.real_server import RealServer
from tests.tiny_model import write_tiny_model

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
FUNCTION = {"type": "function", "function": {"name": "f"}}
ROUTES: dict[str, tuple[type[msgspec.Struct], dict[str, Any]]] = {
    "/v1/chat/completions": (
        ChatCompletionRequest,
        {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    ),
    "/v1/completions": (CompletionRequest, {"model": "tiny", "prompt": "Hi", "max_tokens": 1}),
    "/v1/embeddings": (EmbeddingRequest, {"model": "tiny", "input": "Hi"}),
    "/v1/score": (ScoreRequest, {"model": "tiny", "text_1": "Hi", "text_2": "there"}),
    "/v1/rerank": (RerankRequest, {"model": "tiny", "query": "Hi", "documents": ["there"]}),
    "/v1/classify": (ClassifyRequest, {"model": "tiny", "input": "Hi"}),
    "/tokenize": (TokenizeRequest, {"messages": [{"role": "user", "content": "Hi"}]}),
    "/detokenize": (DetokenizeRequest, {"tokens": [1, 2]}),
}
SCORED_ROUTES = {"/v1/score", "/v1/rerank", "/v1/classify"}
CASES = [(route, name) for route, (body, _) in ROUTES.items() for name in field_names(body)]
# A whole value for each field that holds objects; its members are spoilt one by one.
WHOLE: dict[str, Any] = {
    "messages": [
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "Hi"}],
            "name": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            "tool_call_id": None,
            "refusal": None,
            "reasoning": None,
            "reasoning_content": "x",
            "function_call": {"name": "f", "arguments": "{}"},
            "audio": None,
            "annotations": None,
        }
    ],
    "tools": [TOOL],
    "functions": [TOOL["function"]],
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"a": {"type": "string"}}}},
    },
    "structured_outputs": {"json": {"type": "object"}, "whitespace_pattern": None, "regex": None},
    "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [FUNCTION]}},
    "reasoning": {"effort": "low", "enabled": True, "exclude": False},
    "stream_options": {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False},
    "guided_json": {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"]},
    "json_schema": {"type": "array", "items": {"type": "integer"}, "minItems": 1},
    "logit_bias": {"5": 1.0},
    "metadata": {"a": "b"},
}
# What has to stand beside a field for it to be allowed.
BESIDE: dict[str, dict[str, Any]] = {"tool_choice": {"tools": [TOOL]}, "stream_options": {"stream": True}}


class Servers:
    """Each route's body goes to the model that it is for: one that generates, or one for scores."""

    def __init__(self, generating: Path, scoring: Path) -> None:
        self._generating = RealServer(generating)
        self._scoring = RealServer(scoring)

    def ask(self, route: str, body: Any) -> tuple[int, bytes]:
        return (self._scoring if route in SCORED_ROUTES else self._generating).ask(route, body)

    def close(self) -> None:
        for server in (self._generating, self._scoring):
            assert server.engine.num_unfinished_requests == 0
            server.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    scoring = tmp_path_factory.mktemp("tiny-scorer")
    write_model(scoring, "BertForSequenceClassification", num_labels=1)
    servers = Servers(write_tiny_model(tmp_path_factory.mktemp("tiny-model"), context=2048), scoring)
    yield servers
    servers.close()


def check(server: Servers, route: str, body: dict[str, Any], bad: BadValue) -> int:
    """The status, which is 200 or a 400 that names the field."""
    status, answer = server.ask(route, body)
    if status == 200:
        assert not bad.is_wrong_kind, bad
        return status
    error = json.loads(answer)["error"]
    assert status == 400 or (status == 404 and bad.field == "model"), (bad, error)
    assert error["type"] == "invalid_request_error"
    assert error["param"].partition("[")[0].partition(".")[0] == bad.field, (bad, error)
    return status


@pytest.mark.parametrize(("route", "name"), CASES)
def test_a_bad_value_is_refused_by_its_field(server: Servers, route: str, name: str) -> None:
    body_type, base = ROUTES[route]
    if name == "stream_options":
        base = {**base, "stream": True}
    statuses = {check(server, route, {**base, name: bad.value}, bad) for bad in bad_values(body_type, name)}
    assert statuses - {200}, "some value must be wrong"


@pytest.mark.parametrize(("route", "name"), [case for case in CASES if case[1] in WHOLE])
def test_a_bad_value_inside_a_field_is_refused_by_its_field(server: Servers, route: str, name: str) -> None:
    _, base = ROUTES[route]
    beside = BESIDE.get(name, {})
    assert check(server, route, {**base, **beside, name: WHOLE[name]}, BadValue(name, None, False)) == 200
    num_refused = 0
    for value in spoilt(WHOLE[name]):
        bad = BadValue(name, value, False)
        num_refused += check(server, route, {**base, **beside, name: value}, bad) == 400
    assert num_refused > 10


def spoilt(value: Any) -> Iterator[Any]:
    """The value with one part of it, at any depth, replaced by something else or joined by a stranger."""
    for kind, values in VALUES.items():
        yield from values[:3] if kind != "array" else values[-1:]
    if isinstance(value, dict):
        yield {**value, "stranger": 1}
        for key, part in value.items():
            yield {other: kept for other, kept in value.items() if other != key}
            for bad in spoilt(part):
                yield {**value, key: bad}
    elif isinstance(value, list):
        for position, part in enumerate(value):
            for bad in spoilt(part):
                yield [*value[:position], bad, *value[position + 1 :]]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b"{", b'{"a":' * 5000, b"\xff", b'{"model":"\\ud800"}', b'{"n":NaN}']
)
def test_a_body_that_is_no_object_is_a_400(server: Servers, route: str, body: bytes) -> None:
    assert server.ask(route, body)[0] == 400


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("number", [b"1e400", b"-1e400", b"1" + b"0" * 400, b"1e-400", b"-0", b"0.1e1"])
def test_numbers_at_the_edge_of_json_are_refused_or_understood(
    server: Servers, route: str, number: bytes
) -> None:
    body_type, base = ROUTES[route]
    encoded = json.dumps(base).encode()[:-1]
    for field in inspect.type_info(body_type).fields:  # type: ignore[attr-defined]
        name = field.encode_name
        if name in base:
            continue
        status, answer = server.ask(route, encoded + b',"%b":%b}' % (name.encode(), number))
        assert status in (200, 400), answer
        if status == 400:
            assert json.loads(answer)["error"]["param"].partition(".")[0] == name
