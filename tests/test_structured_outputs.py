"""StructuredOutputs: exactly one wish, said in a form that is stored once."""

from __future__ import annotations

from typing import Any

import pytest

from graphllm.errors import InvalidRequestError
from graphllm.structured_outputs import MAX_STARTS_AFTER, StructuredOutputs

RECURSIVE: dict[str, Any] = {}
RECURSIVE["again"] = RECURSIVE

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "exactly one"),
    ({"json_object": False}, "exactly one"),
    ({"json": "{}", "regex": "a"}, "json and regex"),
    ({"json_object": True, "choice": ["a"]}, "json_object and choice"),
    ({"json": ""}, "json is empty"),
    ({"json": 3}, "json must be"),
    ({"json": ["a"]}, "json must be"),
    ({"json": {"const": float("nan")}}, "json cannot be written"),
    ({"json": {"const": b"x"}}, "json cannot be written"),
    ({"json": RECURSIVE}, "json cannot be written"),
    ({"json_object": 1}, "json_object must be"),
    ({"regex": ""}, "regex is empty"),
    ({"regex": 1}, "regex must be"),
    ({"grammar": b"start: x"}, "grammar must be"),
    ({"choice": []}, "choice is empty"),
    ({"choice": "abc"}, "choice must be"),
    ({"choice": [1]}, "choice must be"),
    ({"regex": "a", "whitespace_pattern": 1}, "whitespace_pattern must be"),
    ({"json": "{}", "disable_additional_properties": 1}, "disable_additional_properties must be"),
    ({"regex": "a", "starts_after": "x"}, "starts_after must be"),
    ({"regex": "a", "starts_after": [""]}, "starts_after"),
    ({"regex": "a", "starts_after": ["x" * 300]}, "starts_after"),
    ({"regex": "a", "starts_after": ["x"] * (MAX_STARTS_AFTER + 1)}, "starts_after"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[f"{values!r:.50}" for values, _ in REFUSED])
def test_wish_that_is_none_or_several_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        StructuredOutputs(**values)
    assert caught.value.param == "structured_outputs"


def test_schemas_are_kept_as_text() -> None:
    schema = {"type": "object", "properties": {"größe": {"type": "integer"}}}
    wish = StructuredOutputs(json=schema)  # type: ignore[arg-type]
    assert wish.json == '{"type":"object","properties":{"größe":{"type":"integer"}}}'
    assert wish == StructuredOutputs(json=wish.json) and hash(wish) == hash(StructuredOutputs(json=wish.json))
    assert StructuredOutputs(json=True).json == "true"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"json": "{}"}, "json"),
        ({"json_object": True}, "json_object"),
        ({"regex": "a+"}, "regex"),
        ({"choice": ["a", "b"]}, "choice"),
        ({"grammar": "start: /a/"}, "grammar"),
    ],
)
def test_kind_is_the_field_that_was_given(values: dict[str, Any], kind: str) -> None:
    assert StructuredOutputs(**values, starts_after=["</think>"]).kind == kind  # type: ignore[arg-type]
