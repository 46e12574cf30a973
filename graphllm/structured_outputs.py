"""What a request asks its output to look like: a schema, a pattern, a choice or a grammar.

Owns the shape of the wish. Whether a schema or grammar is one that can be enforced is decided where it is
compiled, in `structured/`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from graphllm.errors import InvalidRequestError

MAX_STARTS_AFTER = 8
MAX_STARTS_AFTER_LENGTH = 256
_PARAM = "structured_outputs"
_KINDS = ("json", "json_object", "regex", "choice", "grammar")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """Exactly one of the first five; validated at construction.

    json: a JSON schema as JSON text; a dict or a bool is encoded at construction. json_object: any JSON
    object. regex: the whole output matches it. choice: the output is one of these texts. grammar: Lark, or
    GBNF/EBNF.
    whitespace_pattern: a regex for the whitespace between JSON's parts, None for the compiler's own.
    disable_additional_properties: whether objects of a schema that lists their properties and does not say
    whether others may follow have no others; None for the compiler's own choice, which is that they have
    none.
    starts_after: the output is free until the first of these texts has appeared in it, for example
    "</think>", and constrained behind it; empty: constrained at once.

    Raises InvalidRequestError with param "structured_outputs", whose message names the field.
    """

    json: str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    whitespace_pattern: str | None = None
    disable_additional_properties: bool | None = None
    starts_after: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "json", _as_schema_text(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _as_texts("choice", self.choice))
        object.__setattr__(self, "starts_after", _as_texts("starts_after", self.starts_after))
        if not isinstance(self.json_object, bool):
            raise _error(f"json_object must be true or false, not {self.json_object!r:.60}.")
        closes = self.disable_additional_properties
        if not isinstance(closes, bool | None):
            raise _error(f"disable_additional_properties must be true or false, not {closes!r:.60}.")
        for name in ("regex", "grammar", "whitespace_pattern"):
            _check_text(name, getattr(self, name))
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            what = " and ".join(given) if given else "none"
            raise _error(f"give exactly one of {', '.join(_KINDS)}; {what} was given.")
        if self.choice == ():
            raise _error("choice is empty: at least one text must be allowed.")
        if len(self.starts_after) > MAX_STARTS_AFTER:
            raise _error(f"starts_after has more than {MAX_STARTS_AFTER} texts.")
        if any(not 0 < len(text) <= MAX_STARTS_AFTER_LENGTH for text in self.starts_after):
            raise _error(f"starts_after: each text has 1 to {MAX_STARTS_AFTER_LENGTH} characters.")

    @property
    def kind(self) -> str:
        """The name of the field that is given: json, json_object, regex, choice or grammar."""
        return next(name for name in _KINDS if getattr(self, name) not in (None, False))


def _as_schema_text(schema: Any) -> str | None:
    if schema is None:
        return None
    if isinstance(schema, str):
        if not schema.strip():
            raise _error("json is empty: it must be a JSON schema.")
        return schema
    if not isinstance(schema, dict | bool):
        raise _error(f"json must be a JSON schema as an object or as text, not {schema!r:.60}.")
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise _error(f"json cannot be written as JSON: {error}.") from error


def _as_texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise _error(f"{name} must be a list of strings.")
    return tuple(value)


def _check_text(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise _error(f"{name} must be a string, not {value!r:.60}.")
    if not value:
        raise _error(f"{name} is empty.")


def _error(message: str) -> InvalidRequestError:
    return InvalidRequestError(f"structured_outputs: {message}", param=_PARAM)
