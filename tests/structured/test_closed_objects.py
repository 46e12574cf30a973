"""Objects that list their properties have no others, wherever that leaves something to say."""

from __future__ import annotations

import json
import time
from typing import Any

import jsonschema
import pytest

from graphllm.errors import GraphLLMError, InvalidRequestError
from graphllm.structured.closed_objects import close_objects
from graphllm.structured.limits import GrammarLimits
from graphllm.structured.work_budget import WorkBudget
from graphllm.structured_outputs import StructuredOutputs
from tests.structured.conftest import Bench

TEXT = {"type": "string", "maxLength": 2}
TAGGED = [
    {"type": "object", "properties": {"tag": {"const": tag}, "n": {"type": "null"}}, "required": ["tag"]}
    for tag in ("x", "y")
]


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with its objects closed."""
    schema = json.loads(json.dumps(schema))
    close_objects(schema, WorkBudget(GrammarLimits()))
    return schema


def closed_paths(schema: dict[str, Any]) -> set[str]:
    """Pointers to the objects that were closed."""

    def walk(value: Any, path: str) -> set[str]:
        found = {path} if isinstance(value, dict) and value.get("additionalProperties") is False else set()
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return found.union(
            *(walk(item, f"{path}/{key}") for key, item in items if isinstance(item, dict | list))
        )

    return walk(closed(schema), "")


A, B = {"properties": {"a": TEXT}}, {"properties": {"b": TEXT}, "required": ["b"]}

CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "lists": (A, {""}),
    "lists none": ({"type": "object", "properties": {}}, {""}),
    "no list": ({"type": "object"}, set()),
    "true": ({**A, "additionalProperties": True}, set()),
    "a schema": ({**A, "additionalProperties": TEXT}, set()),
    "patterns": ({**A, "patternProperties": {"^x": TEXT}}, set()),
    "unevaluated": ({**A, "unevaluatedProperties": True}, set()),
    "required name that is not listed": ({**A, "required": ["b"]}, set()),
    "more properties than listed": ({**A, "minProperties": 2}, set()),
    "nested": ({"properties": {"o": A, "l": {"items": A}}}, {"", "/properties/o", "/properties/l/items"}),
    "below an open one": ({"properties": {"o": A}, "additionalProperties": True}, {"/properties/o"}),
    "a property called properties": ({"properties": {"properties": TEXT}}, {""}),
    "data is no schema": ({"properties": {"a": {"const": {"properties": {}}}}}, {""}),
    "allOf": ({"allOf": [A, B]}, set()),
    "allOf of one": ({"allOf": [A], "description": "a"}, {"/allOf/0"}),
    "allOf beside": ({**A, "allOf": [{"required": ["a"]}]}, {""}),
    "allOf that knows all": (
        {"allOf": [A, {"properties": {"a": TEXT, "b": TEXT}}]},
        {"/allOf/1"},
    ),
    "anyOf": ({"anyOf": [A, B]}, {"/anyOf/0", "/anyOf/1"}),
    "anyOf beside": ({"anyOf": [{"required": ["a"]}, {"required": ["b"]}], **A}, set()),
    "reference": ({"$ref": "#/$defs/x", "$defs": {"x": A}}, {"/$defs/x"}),
    "reference beside": ({"$ref": "#/$defs/x", "$defs": {"x": A}, **B}, set()),
    "reference used in both ways": (
        {
            "$defs": {"x": A},
            "properties": {"p": {"$ref": "#/$defs/x"}, "q": {"allOf": [{"$ref": "#/$defs/x"}, B]}},
        },
        {""},
    ),
    "the same property in two parts": (
        {"allOf": [{"properties": {"o": A}}, {"properties": {"o": B, "p": A}}]},
        {"/allOf/1", "/allOf/1/properties/p"},
    ),
    "reference by name": ({"properties": {"p": {"$ref": "#anchor"}, "q": A}}, set()),
    "reference into a list": (
        {"anyOf": [A, {"type": "array", "items": {"$ref": "#/anyOf/0"}}]},
        {"/anyOf/0"},
    ),
    "another base": ({"properties": {"p": {"$id": "http://example.com/p", **A}}}, set()),
    "recursion": (
        {"$ref": "#/$defs/x", "$defs": {"x": {"properties": {"next": {"$ref": "#/$defs/x"}}}}},
        {"/$defs/x"},
    ),
    "oneOf by tag": ({"oneOf": TAGGED}, {"/oneOf/0", "/oneOf/1"}),
    "oneOf by type": ({"oneOf": [{"type": "object", **A}, {"type": "null"}]}, {"/oneOf/0"}),
    "oneOf by constant": ({"oneOf": [{"type": "object", **A}, {"enum": ["auto", 1]}]}, {"/oneOf/0"}),
    "oneOf of the same tag": (
        {"oneOf": [TAGGED[0], {**TAGGED[0], "properties": {"tag": {"enum": ["z", "x"]}}}]},
        set(),
    ),
    "oneOf that only closing makes exclusive": ({"oneOf": [{"type": "object", **A}, {**B}]}, set()),
    "below a oneOf that only closing makes exclusive": (
        {"oneOf": [{"properties": {"o": part}, "required": ["o"]} for part in (A, B)]},
        set(),
    ),
}


@pytest.mark.parametrize(("schema", "expected"), CASES.values(), ids=CASES)
def test_objects_are_closed_where_that_is_safe(schema: dict[str, Any], expected: set[str]) -> None:
    assert closed_paths(schema) == expected


SATISFIABLE = [case for case in CASES if case not in ("unevaluated", "reference by name", "another base")]


@pytest.mark.parametrize("case", SATISFIABLE)
def test_closing_leaves_valid_outputs_and_nothing_else(case: str, byte_level: Bench) -> None:
    schema = CASES[case][0]
    structured = StructuredOutputs(json=schema)  # type: ignore[arg-type]
    try:
        byte_level.compiler.compile(
            StructuredOutputs(json=schema, disable_additional_properties=False)  # type: ignore[arg-type]
        )
    except InvalidRequestError:
        # What the library refuses as it came is not let through because it was closed.
        with pytest.raises(InvalidRequestError):
            byte_level.compiler.compile(structured)
        return
    for seed in range(8):
        walk = byte_level.walk(structured, seed)
        walk.run(40)
        walk.complete()
        jsonschema.Draft202012Validator(schema).validate(json.loads(walk.output))


def _pairs(text: bytes) -> list[list[str]]:
    """The keys of each object in a JSON text, as they were written."""
    found: list[list[str]] = []

    def keep(pairs: list[tuple[str, Any]]) -> None:
        found.append([key for key, _ in pairs])

    json.loads(text, object_pairs_hook=keep)
    return found


def test_keys_of_a_closed_object_are_listed_ones_and_come_once(bench: Bench) -> None:
    schema = {"type": "object", "properties": {"a": TEXT, "b": {"type": "object", "properties": {"c": TEXT}}}}
    for seed in range(40):
        walk = bench.walk(StructuredOutputs(json=schema), seed)  # type: ignore[arg-type]
        walk.run(60)
        walk.complete()
        for keys in _pairs(walk.output):
            assert len(keys) == len(set(keys)) and set(keys) <= {"a", "b", "c"}


def test_objects_stay_open_where_the_request_says_so(byte_level: Bench) -> None:
    schema = {"type": "object", "properties": {"a": TEXT}}
    grammar = f"start: %json {json.dumps(schema)}"
    for wish in ({"json": json.dumps(schema)}, {"grammar": grammar}):
        for choice, is_open in ((None, False), (True, False), (False, True)):
            walk = byte_level.walk(StructuredOutputs(**wish, disable_additional_properties=choice))
            for character in '{"':
                walk.allowed()
                walk.take(byte_level.id_of(character))
            assert (byte_level.id_of("q") in walk.allowed().tolist()) is is_open


def test_least_number_of_properties_is_understood_where_the_listed_ones_are_all(byte_level: Bench) -> None:
    schema = {"properties": {"a": TEXT, "b": TEXT}, "required": ["a", "b"], "minProperties": 2}
    walk = byte_level.walk(StructuredOutputs(json={"type": "object", **schema}))  # type: ignore[arg-type]
    walk.complete()
    assert json.loads(walk.output).keys() == {"a", "b"}
    with pytest.raises(InvalidRequestError, match="minProperties"):
        byte_level.compiler.compile(
            StructuredOutputs(json={**schema, "additionalProperties": True})  # type: ignore[arg-type]
        )


def test_the_walk_pays_for_what_it_looks_at() -> None:
    """Each of these has all those behind it in its family."""
    parts = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}, A]} for i in range(2_000)}
    schema = {
        "$defs": {**parts, "d2000": A},
        "properties": {f"p{i}": {"$ref": f"#/$defs/d{i}"} for i in range(2_000)},
    }
    started = time.thread_time()
    with pytest.raises(GraphLLMError, match="too large"):
        close_objects(schema, WorkBudget(GrammarLimits()))
    assert time.thread_time() - started < 1
