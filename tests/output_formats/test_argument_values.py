"""Arguments without quotes are strings or something else by the tool's schema."""

from __future__ import annotations

import json

import pytest

from graphllm.output_formats.argument_values import MAX_SCHEMA_STEPS, argument_as_json, argument_kinds

SCHEMA: dict[str, object] = {
    "properties": {
        "string": {"type": "string"},
        "types": {"type": ["string", "null"]},
        "any": {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/odd~1name"}]},
        "enum": {"enum": ["a", 1, 1.5, True, None, [], {}]},
        "const": {"const": "x"},
        "unknown": {},
        "loop": {"$ref": "#/properties/loop"},
        "elsewhere": {"$ref": "https://example.org/schema"},
    },
    "$defs": {"odd/name": {"type": "array"}},
}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("string", {"string"}),
        ("types", {"string", "null"}),
        ("any", {"integer", "array"}),
        ("enum", {"string", "integer", "number", "boolean", "null", "array", "object"}),
        ("const", {"string"}),
        *((name, set()) for name in ("unknown", "loop", "elsewhere", "missing")),
    ],
)
def test_kinds_of_an_argument(name: str, kinds: set[str]) -> None:
    assert argument_kinds(SCHEMA, name) == kinds


def test_a_schema_of_another_shape_says_nothing() -> None:
    for schema in (
        None,
        {},
        {"properties": []},
        {"properties": {"a": "string"}},
        {"properties": {"a": True}},
    ):
        assert argument_kinds(schema, "a") == set()


def test_a_wide_schema_is_looked_at_for_a_while_only() -> None:
    wide = {"anyOf": [{"type": "string"}] * MAX_SCHEMA_STEPS}
    assert argument_kinds({"properties": {"a": wide}}, "a") == set()


@pytest.mark.parametrize(
    ("text", "kinds", "expected"),
    [
        ("12", set(), 12),
        ("12", {"integer"}, 12),
        ("12", {"number"}, 12),
        ("12", {"string"}, "12"),
        ("12", {"string", "null"}, "12"),
        ("12", {"string", "number"}, 12),
        ("null", {"string", "null"}, None),
        ("null", {"string"}, "null"),
        ("True", {"boolean"}, True),
        ("None", {"integer", "null"}, None),
        ("True", {"string", "boolean"}, "True"),
        ("1.0", {"integer"}, 1.0),
        ("[1, ", {"array"}, "[1, "),
        (' {"a": 1}\n', {"object"}, {"a": 1}),
        ('"a"', {"string", "null"}, "a"),
        ('"a"', set(), "a"),
        ("a", set(), "a"),
        ("", {"integer"}, ""),
        (" a\n", set(), " a\n"),
    ],
)
def test_a_text_as_json(text: str, kinds: set[str], expected: object) -> None:
    value = json.loads(argument_as_json(text, frozenset(kinds)))
    assert (value, type(value)) == (expected, type(expected))
