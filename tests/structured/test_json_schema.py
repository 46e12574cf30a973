"""Schemas: what is refused by name, and where the library needs help to keep its promise."""

from __future__ import annotations

import json
from typing import Any

import pytest

from graphllm.errors import InvalidRequestError
from graphllm.structured_outputs import StructuredOutputs
from tests.structured.conftest import Bench

DEEP = '{"items":' * 100 + "{}" + "}" * 100

REFUSED: dict[str, tuple[Any, str]] = {
    "not JSON": ('{"type":', "not valid JSON"),
    "NaN": ('{"minimum": NaN}', "NaN"),
    "a number": ("3", "must be a JSON schema"),
    "a list": ("[]", "must be a JSON schema"),
    "false": (False, "not"),
    "unknown type": ({"type": "frog"}, "frog"),
    "not": ({"not": {}}, '"not"'),
    "if": ({"if": {}, "then": {}}, '"if"'),
    "uniqueItems": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "contains": ({"contains": {}}, "contains"),
    "propertyNames": ({"propertyNames": {}}, "propertyNames"),
    "unevaluatedProperties": ({"unevaluatedProperties": False}, "unevaluatedProperties"),
    "dependentRequired": ({"dependentRequired": {}}, "dependentRequired"),
    "remote reference": ({"$ref": "https://example.com/a"}, "https://example.com/a"),
    "missing reference": ({"$ref": "#/$defs/gone"}, "gone"),
    "circular": ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "no text"),
    "unknown format": ({"type": "string", "format": "frog"}, "frog"),
    "lookahead": ({"type": "string", "pattern": "(?=a)"}, "look-around"),
    "broken pattern": ({"type": "string", "pattern": "["}, "unclosed"),
    "no value": ({"enum": []}, "Unsatisfiable"),
    "empty range": ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
    "overlapping oneOf": ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
    "minProperties": ({"type": "object", "minProperties": 2}, "minProperties"),
    "options": ({"x-guidance": {"lenient": True}}, "x-guidance"),
    "options inside": ({"properties": {"a": {"x-guidance": {}}}}, "x-guidance"),
    "lone surrogate": ('{"const":"\\ud800"}', "surrogate"),
    "too deep": (DEEP, "levels"),
    "far too deep": ("[" * 60_000, "nests too deeply"),
    "too many bytes": ({"description": "x" * 70_000}, "bytes"),
    "too many values": ({"enum": list(range(1_001))}, "values"),
    "long value": ({"const": "x" * 5_000}, "4096 bytes"),
    "long name": ({"properties": {"x" * 5_000: {}}}, "4096 bytes"),
    "huge integer": ({"const": 2**70}, "64 bits"),
    "huge bound": ({"minimum": 1e300}, "64-bit"),
    "huge count": ({"minItems": 10**9}, "minItems"),
    "negative count": ({"type": "string", "minLength": -1}, "minLength"),
    "huge divisor": ({"type": "integer", "multipleOf": 999_983}, "too large"),
    "divisors": ({"allOf": [{"multipleOf": 97}, {"multipleOf": 91}, {"multipleOf": 89}]}, "too large"),
    "zero divisor": ({"type": "integer", "multipleOf": 0}, "multipleOf"),
    "many properties": ({"properties": {f"p{i}": {"type": "string"} for i in range(400)}}, "too large"),
    "many true ones": ({"properties": {f"p{i}": True for i in range(400)}}, "too large"),
    "many patterns": ({"anyOf": [{"type": "string", "pattern": f"^{i}"} for i in range(400)]}, "too large"),
    "many exclusions": ({"oneOf": [{"const": i} for i in range(60)]}, "too large"),
    "multiplied out": (
        {"allOf": [{"anyOf": [{"required": [f"{i}{j}"]} for j in range(10)]} for i in range(10)]},
        "too large",
    ),
    "long pattern": ({"type": "string", "pattern": "a" * 3_000}, "characters"),
    "repeats": ({"type": "string", "pattern": "((a{1,100}){1,100}){1,100}"}, "1000000 times"),
}


@pytest.mark.parametrize(("schema", "word"), REFUSED.values(), ids=REFUSED)
def test_schema_is_refused_by_name(schema: Any, word: str, byte_level: Bench) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        byte_level.compiler.compile(StructuredOutputs(json=schema))
    assert word in caught.value.message
    assert caught.value.param == "structured_outputs"
    assert len(caught.value.message) < 700


ACCEPTED: dict[str, Any] = {
    "true": True,
    "nothing": {},
    "annotations": {
        "title": "t",
        "description": "d",
        "default": 1,
        "examples": [2],
        "$comment": "c",
        "x": [{}],
    },
    "a property called minimum": {
        "properties": {"minimum": {"type": "string"}, "enum": {}, "x-guidance": {}}
    },
    "a value called pattern": {"const": {"pattern": "(", "multipleOf": 0}},
    "dialect": {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "null"},
    "optional fields beside references": {
        "$defs": {"a": {"type": "integer"}},
        "properties": {f"p{i}": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]} for i in range(40)},
    },
    "two hundred properties": {"properties": {f"p{i}": {"type": "string"} for i in range(200)}},
    "a thousand values": {"enum": list(range(1_000))},
    "money": {"type": "number", "multipleOf": 0.01},
}


@pytest.mark.parametrize("schema", ACCEPTED.values(), ids=ACCEPTED)
def test_schema_is_accepted(schema: Any, byte_level: Bench) -> None:
    walk = byte_level.walk(StructuredOutputs(json=schema))
    walk.complete()
    json.loads(walk.output)


@pytest.mark.parametrize(
    ("schema", "excluded", "included"),
    [
        ({"exclusiveMinimum": 47, "maximum": 47.5}, b"47", b"47.25"),
        ({"minimum": -1.5, "exclusiveMaximum": -1}, b"-1", b"-1.25"),
        ({"exclusiveMinimum": 0, "exclusiveMaximum": 0.5}, b"0", b"0.125"),
        ({"exclusiveMinimum": 0, "maximum": 1}, b"0", b"1"),
    ],
)
def test_excluded_bound_is_excluded(
    schema: dict[str, Any], excluded: bytes, included: bytes, byte_level: Bench
) -> None:
    structured = StructuredOutputs(json={"type": "number", **schema})
    for text, is_allowed in ((excluded, False), (included, True)):
        walk = byte_level.walk(structured)
        for byte in text:
            allowed = walk.allowed().tolist()
            walk.take(next(i for i in allowed if byte_level.tokenizer.token_bytes(i) == bytes([byte])))
        assert (
            walk.is_over or not byte_level.end_token_ids.isdisjoint(walk.allowed().tolist())
        ) == is_allowed


def test_properties_come_in_the_order_of_the_schema(byte_level: Bench) -> None:
    names = ["z", "a", "m"]
    schema = {"type": "object", "properties": {n: {"type": "null"} for n in names}, "required": names}
    walk = byte_level.walk(StructuredOutputs(json={**schema, "additionalProperties": False}))
    walk.complete()
    assert list(json.loads(walk.output)) == names
