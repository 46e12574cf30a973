"""JSON schemas of requests: read with bounds, checked, and given the whitespace rule.

Owns the caps on schemas and the keywords whose enforcement by the library would not keep its promise. What
the library understands, and how it enforces it, is the library's; what it does not understand it says by
name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from graphllm.structured.closed_objects import close_objects
from graphllm.structured.compiled import grammar_error
from graphllm.structured.limits import GrammarLimits
from graphllm.structured.patterns import check_pattern
from graphllm.structured.schema_branches import BranchCounter, intersects
from graphllm.structured.work_budget import (
    BRANCH_PAIR,
    COMBINATION,
    ENUM_OBJECT,
    ENUM_VALUE,
    FORMAT,
    LENGTH_RANGE,
    LITERAL_BYTES,
    MULTIPLE_OF_STATES,
    NUMBER_RANGE,
    SUBSCHEMA,
    WorkBudget,
)

WHITESPACE = r"\x20|\n[\x20\t]{0,32}"
"""At each place where JSON allows whitespace: nothing, one blank, or a new line and its indentation.

All that models write and nothing that does not end: left alone, small ones fill pages with blanks.
"""

_OPTIONS_KEY = "x-guidance"
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_RANGES = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_MAX_COUNT = 1_000_000
_LONG_STRING = 1_000
_MAX_INTEGER = 2**63 - 1
_OPEN_END = 1e-6
_KEYWORDS_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_KEYWORDS_OF_VALUES = ("enum", "const", "default", "examples", "required")


def read_json(text: str, name: str, *, limits: GrammarLimits) -> Any:
    """JSON text with bounds on its size and depth. Raises InvalidRequestError naming `name`."""
    check_text_size(text, name, limits=limits)
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it nests too deeply" if isinstance(error, RecursionError) else str(error)
        raise grammar_error(f"{name} is not valid JSON: {reason}.") from error
    if "\\ud" in text.lower():
        check_text_size(json.dumps(value, ensure_ascii=False), name, limits=limits)
    level: list[Any] = [value]
    for _ in range(limits.max_depth):
        level = [item for parent in level for item in children(parent)]
        if not level:
            return value
    raise grammar_error(f"{name} has more than {limits.max_depth} levels within each other.")


def check_text_size(text: str, name: str, *, limits: GrammarLimits) -> None:
    """Raises InvalidRequestError for lone surrogates, and above max_text_bytes."""
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise grammar_error(f"{name} has a lone surrogate; it is not valid Unicode.") from error
    if num_bytes > limits.max_text_bytes:
        raise grammar_error(f"{name} has {num_bytes} bytes; at most {limits.max_text_bytes} are allowed.")


def children(value: Any) -> Sequence[Any]:
    """The containers directly within a JSON value."""
    if isinstance(value, dict):
        return [item for item in value.values() if isinstance(item, dict | list)]
    if isinstance(value, list):
        return [item for item in value if isinstance(item, dict | list)]
    return []


def prepare_schema(
    schema: Any,
    name: str,
    *,
    limits: GrammarLimits,
    budget: WorkBudget,
    whitespace: str,
    closes_objects: bool = True,
) -> str:
    """The schema's JSON text as the library takes it, with its options inside; `schema` itself is changed.

    whitespace: a regex for the whitespace between JSON's parts. closes_objects: objects that list properties
    have no others, see `closed_objects.py`.
    Raises InvalidRequestError naming `name` for a schema above the limits.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, dict):
        raise grammar_error(f"{name} must be a JSON schema: an object, true or false.")
    check = _Check(schema, name, limits, budget)
    check.run()
    if closes_objects:
        close_objects(schema, budget)
    check.check_counted()
    return json.dumps(
        schema | {_OPTIONS_KEY: {"whitespace_pattern": whitespace}}, ensure_ascii=False, separators=(",", ":")
    )


class _Check:
    """One walk over a schema, which is known to be shallow."""

    def __init__(self, schema: dict[str, Any], name: str, limits: GrammarLimits, budget: WorkBudget) -> None:
        self._schema = schema
        self._branches_of = BranchCounter(schema)
        self._name = name
        self._limits = limits
        self._budget = budget
        self._num_values = 0
        self._divisors = {1}
        self._has_intersections = False
        self._counted: list[dict[str, Any]] = []
        self._keywords: Mapping[str, Callable[[str, Any], None]] = {
            **dict.fromkeys(_COUNTS, self._count),
            **dict.fromkeys(_RANGES, self._range),
            "multipleOf": self._multiple_of,
            "pattern": self._pattern,
            "patternProperties": self._pattern_properties,
            "format": self._format,
            "enum": self._enum,
            "const": self._const,
            "oneOf": self._one_of,
            _OPTIONS_KEY: self._options,
        }

    def run(self) -> None:
        pending: list[Any] = [self._schema]
        while pending:
            item = pending.pop()
            if isinstance(item, list):
                pending += item
            elif isinstance(item, dict):
                pending += self._subschemas_of(item)
        if self._has_intersections:
            # Any of them may meet any other in one number.
            self._budget.spend(math.lcm(*self._divisors) // MULTIPLE_OF_STATES)

    def check_counted(self) -> None:
        """Refuse a number of properties at least where their names are free, once it is known where."""
        for schema in self._counted:
            if schema.get("additionalProperties") is not False:
                # The library counts a repeated key twice, and a reader of the output once.
                self._refuse("minProperties", "above 1 is not supported beside free property names")

    def _subschemas_of(self, schema: dict[str, Any]) -> list[Any]:
        self._budget.spend(SUBSCHEMA)
        _close_open_ends(schema)
        if schema.get("minProperties", 0) not in (0, 1):
            self._counted.append(schema)
        if intersects(schema):
            self._has_intersections = True
            self._budget.spend(COMBINATION * self._branches_of.count(schema))
        found: list[Any] = []
        for key, value in schema.items():
            if (check := self._keywords.get(key)) is not None:
                check(key, value)
            if key in _KEYWORDS_OF_VALUES:
                continue
            if key in _KEYWORDS_OF_SCHEMAS and isinstance(value, dict):
                self._check_names(value)
                found += value.values()
                self._budget.spend(SUBSCHEMA * sum(not isinstance(item, dict) for item in value.values()))
            else:
                found.append(value)
        return found

    def _check_names(self, schemas: Mapping[str, Any]) -> None:
        for property_name in schemas:
            if len(property_name.encode()) > self._limits.max_literal_bytes:
                self._refuse("properties", f"has a name of more than {self._limits.max_literal_bytes} bytes")

    def _count(self, key: str, value: Any) -> None:
        self._budget.spend(LENGTH_RANGE)
        if isinstance(value, int | float) and value > _MAX_COUNT:
            self._refuse(key, f"is {value}; at most {_MAX_COUNT} is allowed")
        if key in ("minLength", "maxLength") and isinstance(value, int | float) and value > _LONG_STRING:
            self._budget.expect_many_states()

    def _range(self, key: str, value: Any) -> None:
        self._budget.spend(NUMBER_RANGE)
        if isinstance(value, int | float) and abs(value) > _MAX_INTEGER:
            self._refuse(key, "is outside the range of 64-bit integers")

    def _multiple_of(self, key: str, value: Any) -> None:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or value <= 0
        ):
            self._refuse(key, "must be a positive number")
        # The automaton of "divisible by" has as many states as the divisor, decimal places left out.
        divisor = Fraction(str(value)).numerator
        self._divisors.add(divisor)
        self._budget.spend(divisor // MULTIPLE_OF_STATES + 1)

    def _pattern(self, key: str, value: Any) -> None:
        if isinstance(value, str):
            check_pattern(value, f"{self._name}: {key}", limits=self._limits, budget=self._budget)

    def _pattern_properties(self, key: str, value: Any) -> None:
        for pattern in value if isinstance(value, dict) else ():
            self._pattern(key, pattern)
        # Each is compared with each other, whether they are disjoint.
        self._budget.spend(BRANCH_PAIR * len(value) ** 2 if isinstance(value, dict) else 0)

    def _format(self, key: str, value: Any) -> None:
        self._budget.spend(FORMAT)

    def _enum(self, key: str, value: Any) -> None:
        for item in value if isinstance(value, list) else ():
            self._value(key, item)

    def _const(self, key: str, value: Any) -> None:
        self._value(key, value)

    def _value(self, key: str, value: Any) -> None:
        pending = [value]
        while pending:
            item = pending.pop()
            self._budget.spend(ENUM_VALUE)
            self._num_values += 1
            if self._num_values > self._limits.max_enum_values:
                self._refuse(key, f"brings the values of the schema above {self._limits.max_enum_values}")
            if isinstance(item, dict):
                self._budget.spend(ENUM_OBJECT)
                pending += [*item, *item.values()]
            elif isinstance(item, list):
                pending += item
            elif isinstance(item, str):
                self._budget.expect(len(item) // LITERAL_BYTES)
                if len(item.encode()) > self._limits.max_literal_bytes:
                    self._refuse(key, f"has a value of more than {self._limits.max_literal_bytes} bytes")
            elif isinstance(item, int) and abs(item) > _MAX_INTEGER:
                self._refuse(key, "has an integer outside the range of 64 bits")

    def _one_of(self, key: str, value: Any) -> None:
        if isinstance(value, list):
            # Each is compared with each other, whether they exclude each other.
            self._budget.spend(BRANCH_PAIR * len(value) ** 2 // 2)

    def _options(self, key: str, value: Any) -> None:
        self._refuse(key, "is not supported: options of the grammar are the server's")

    def _refuse(self, key: str, what: str) -> None:
        raise grammar_error(f"{self._name}: {key} {what}.")


def _close_open_ends(schema: dict[str, Any]) -> None:
    """Replace a bound that is a whole number and excluded, where the other lies less than one away from it.

    There the library (1.9.1) lets the bound itself through. What is lost are the numbers within a millionth
    of it.
    """
    lows = [schema[key] for key in ("minimum", "exclusiveMinimum") if _is_number(schema.get(key))]
    highs = [schema[key] for key in ("maximum", "exclusiveMaximum") if _is_number(schema.get(key))]
    if not lows or not highs or not 0 < min(highs) - max(lows) < 1:
        return
    for excluded, included, inward in (
        ("exclusiveMinimum", "minimum", _OPEN_END),
        ("exclusiveMaximum", "maximum", -_OPEN_END),
    ):
        bound: Any = schema.get(excluded)
        if _is_number(bound) and bound == math.floor(bound):
            del schema[excluded]
            others = [schema[included]] if _is_number(schema.get(included)) else []
            narrowed = [bound + inward, *others]
            schema[included] = max(narrowed) if inward > 0 else min(narrowed)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
