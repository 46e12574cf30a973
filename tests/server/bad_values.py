"""Bad values for every field of a request, made from the request's own types.

A value is of the wrong kind when the field's type has no place for that kind of JSON: it must be refused. Of
the right kind it may be accepted, or refused; either way nothing else may happen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import inspect

_DEEP: list[Any] = []
for _ in range(200):
    _DEEP = [_DEEP]

VALUES: dict[str, tuple[Any, ...]] = {
    "bool": (True, False),
    "int": (0, -1, 7, 2**31, -(2**63), 2**64 - 1),
    "float": (0.5, -1.5, 1e308, -1e-308),
    "str": ("", "x", "\x00", "ü" * 1000, "{}"),
    "array": ([], [None], [[]], ["x"], [1, "x"], [{}], [{"type": 1}], _DEEP),
    "object": ({}, {"": None}, {"x": 1}, {"type": "x"}, {"type": 1}, {"a": {"b": [{}]}}, {"x": _DEEP}),
}


@dataclass(frozen=True, slots=True)
class BadValue:
    field: str
    value: Any
    is_wrong_kind: bool


def field_names(request_type: type[msgspec.Struct]) -> list[str]:
    return [field.encode_name for field in _fields(request_type)]


def bad_values(request_type: type[msgspec.Struct], name: str) -> Iterator[BadValue]:
    """Every kind of value for a field."""
    (field,) = (field for field in _fields(request_type) if field.encode_name == name)
    kinds = _kinds(field.type)
    for kind, values in VALUES.items():
        is_wrong = kind not in kinds and not (kind == "int" and "float" in kinds)
        for value in values:
            yield BadValue(name, value, is_wrong)


def _fields(request_type: type[msgspec.Struct]) -> tuple[inspect.Field, ...]:
    info = inspect.type_info(request_type)
    assert isinstance(info, inspect.StructType)
    return info.fields


def _kinds(info: Any) -> set[str]:
    """The kinds of JSON that a type takes."""
    match info:
        case inspect.Metadata():
            return _kinds(info.type)
        case inspect.UnionType():
            return set().union(*(_kinds(each) for each in info.types))
        case inspect.BoolType():
            return {"bool"}
        case inspect.IntType():
            return {"int"}
        case inspect.FloatType():
            return {"float"}
        case inspect.StrType():
            return {"str"}
        case inspect.LiteralType():
            return {"str"}
        case inspect.ListType():
            return {"array"}
        case inspect.DictType() | inspect.StructType():
            return {"object"}
        case inspect.NoneType():
            return set()
        case inspect.AnyType():
            return set(VALUES)
    raise AssertionError(f"no kinds for {info}")
