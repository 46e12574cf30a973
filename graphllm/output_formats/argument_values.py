"""Arguments that models write without JSON's quotes, as JSON.

Owns the decision whether a text is a string or something else, from the tool's schema, and the spelling of
strings. Where a text begins and ends is the readers'.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from graphllm.output_formats.json_scanner import is_json

MAX_SCHEMA_STEPS = 200
"""Most subschemas that are looked at for the types of one argument."""

_ENCODE = json.JSONEncoder(ensure_ascii=False).encode
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
# bool before int: it is one.
_PYTHON_KINDS: tuple[tuple[type, str], ...] = (
    *((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string")),
    *((list, "array"), (dict, "object")),
)
_KINDS = {"t": "boolean", "f": "boolean", "n": "null", '"': "string", "{": "object", "[": "array"}


def json_string_content(text: str) -> str:
    """`text` as it stands between the quotes of a JSON string."""
    return _ENCODE(text)[1:-1]


def argument_kinds(schema: Mapping[str, object] | None, name: str) -> frozenset[str]:
    """The JSON types that a tool's schema allows an argument; empty where it does not say.

    Reads `type`, `enum`, `const`, `anyOf`, `oneOf`, `allOf` and references within the schema.
    """
    if schema is None:
        return frozenset()
    properties = schema.get("properties")
    found = properties.get(name) if isinstance(properties, Mapping) else None
    kinds: set[str] = set()
    waiting: list[object] = [found]
    for _ in range(MAX_SCHEMA_STEPS):
        if not waiting:
            return frozenset(kinds)
        part = waiting.pop()
        if not isinstance(part, Mapping):
            continue
        declared = part.get("type")
        kinds.update(kind for kind in _as_list(declared) if isinstance(kind, str))
        if declared is None:
            constants = [*_as_list(part.get("enum")), *([part["const"]] if "const" in part else [])]
            kinds.update(_kind_of_value(constant) for constant in constants)
            for key in ("anyOf", "oneOf", "allOf"):
                waiting.extend(_as_list(part.get(key)))
            if isinstance(part.get("$ref"), str):
                waiting.append(_referenced(schema, str(part["$ref"])))
    return frozenset()


def _as_list(value: object) -> list[object]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _referenced(schema: Mapping[str, object], reference: str) -> object:
    """The part of the schema that `#/a/b` means; None for references elsewhere."""
    start, *steps = reference.split("/")
    part: object = schema if start == "#" else None
    for step in steps:
        part = part.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(part, Mapping) else None
    return part


def _kind_of_value(value: object) -> str:
    for python_type, kind in _PYTHON_KINDS:
        if isinstance(value, python_type):
            return kind
    return "null"


def kind_of(json_text: str) -> str:
    """The JSON type of a JSON text without blanks around it; whole numbers are "integer"."""
    kind = _KINDS.get(json_text[0])
    if kind is None:
        kind = "number" if any(char in ".eE" for char in json_text) else "integer"
    return kind


def is_only_string(kinds: frozenset[str]) -> bool:
    """Whether an argument of these types is a string whatever stands there."""
    return kinds == {"string"}


def argument_as_json(text: str, kinds: frozenset[str]) -> str:
    """The JSON text of an argument that was written as `text`.

    JSON of an allowed type stays as it is; Python's True, False and None are read where a string is not
    meant; everything else is a string.
    """
    bare = text.strip(" \t\r\n")
    if bare in _PYTHON_WORDS and "string" not in kinds:
        bare = _PYTHON_WORDS[bare]
    if bare and is_json(bare):
        kind = kind_of(bare)
        # A quoted text for a string that might have been something else was quoted on purpose.
        if not kinds or kind in kinds or (kind == "integer" and "number" in kinds) or "string" not in kinds:
            return bare
    return _ENCODE(text)
