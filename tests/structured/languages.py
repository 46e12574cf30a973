"""Schemas and patterns drawn from a seed, with the languages kept small enough to be finished by chance."""

from __future__ import annotations

import random
from typing import Any

WORDS = ("id", "name", "kind", "n", "items", "größe", "a b", 'quo"te', "x_1", "back\\slash")
FORMATS = ("date", "time", "date-time", "ipv4", "ipv6", "uuid", "email", "hostname", "duration", "uri")
PATTERNS = (
    "^[a-z]{1,4}$",
    "^x",
    "[0-9]{2}$",
    "^(on|off)$",
    "^[A-Z][a-z]*( [A-Z][a-z]*){0,2}$",
    "^\\d{3}-\\d{2}$",
)


def random_schema(seed: int) -> dict[str, Any]:
    """A schema of moderate size; every kind of keyword that is enforced comes up within a few dozen seeds."""
    draw = _Draw(seed)
    kind = seed % 10
    if kind == 8:
        return draw.recursive()
    if kind == 9:
        return draw.with_definitions()
    return draw.object(3) if kind < 5 else draw.schema(3)


class _Draw:
    def __init__(self, seed: int) -> None:
        self._random = random.Random(f"schema {seed}")

    def schema(self, depth: int) -> dict[str, Any]:
        simple = [self.string, self.integer, self.number, self.constant, self.enum, self.simple_type]
        nested = [self.object, self.array, self.any_of, self.one_of, self.tuple, self.map, self.all_of]
        if depth <= 0 or self._random.random() < 0.45:
            return self._random.choice(simple)()
        return self._random.choice(nested)(depth - 1)

    def simple_type(self) -> dict[str, Any]:
        if self._random.random() < 0.4:
            return {"type": [self._random.choice(["string", "integer", "number", "boolean"]), "null"]}
        return {"type": self._random.choice(["boolean", "null", "string", "integer", "number"])}

    def string(self) -> dict[str, Any]:
        match self._random.randrange(4):
            case 0:
                low = self._random.randrange(4)
                return {"type": "string", "minLength": low, "maxLength": low + self._random.randrange(1, 9)}
            case 1:
                return {"type": "string", "pattern": self._random.choice(PATTERNS)}
            case 2:
                return {"type": "string", "format": self._random.choice(FORMATS)}
            case _:
                return {"type": "string", "maxLength": self._random.randrange(12)}

    def integer(self) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "integer"}
        low = self._random.randrange(-300, 300)
        if self._random.random() < 0.7:
            schema[self._random.choice(["minimum", "exclusiveMinimum"])] = low
        if self._random.random() < 0.7:
            schema[self._random.choice(["maximum", "exclusiveMaximum"])] = low + self._random.randrange(
                20, 5000
            )
        if len(schema) == 1:
            schema["multipleOf"] = self._random.choice([2, 3, 5, 10, 25])
        return schema

    def number(self) -> dict[str, Any]:
        low = round(self._random.uniform(-50, 50), self._random.randrange(4))
        return {
            "type": "number",
            self._random.choice(["minimum", "exclusiveMinimum"]): low,
            self._random.choice(["maximum", "exclusiveMaximum"]): low
            + self._random.choice([1, 0.5, 1234.25]),
        }

    def constant(self) -> dict[str, Any]:
        return {"const": self.value(2)}

    def enum(self) -> dict[str, Any]:
        return {"enum": [self.value(1) for _ in range(self._random.randrange(1, 6))]}

    def value(self, depth: int) -> Any:
        match self._random.randrange(7 if depth else 5):
            case 0:
                return self._random.choice([True, False, None])
            case 1:
                return self._random.randrange(-1000, 1000)
            case 2:
                return self._random.choice([0.5, -1.25, 100.0])
            case 3 | 4:
                return self._random.choice(
                    [*WORDS, "", "line\nbreak", "</s>", "<|im_end|>", "\u2603\U0001f600"]
                )
            case 5:
                return [self.value(depth - 1) for _ in range(self._random.randrange(3))]
            case _:
                return {word: self.value(depth - 1) for word in self.words(2)}

    def words(self, most: int) -> list[str]:
        return self._random.sample(WORDS, self._random.randrange(most + 1))

    def object(self, depth: int) -> dict[str, Any]:
        names = self.words(4)
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {name: self.schema(depth - 1) for name in names},
            "required": [name for name in names if self._random.random() < 0.6],
        }
        match self._random.randrange(4):
            case 0:
                schema["additionalProperties"] = self.schema(0)
            case 1:
                pass
            case _:
                schema["additionalProperties"] = False
        return schema

    def map(self, depth: int) -> dict[str, Any]:
        if self._random.random() < 0.5:
            patterns = {"^k[0-9]$": self.schema(depth - 1), "^v[a-z]{1,3}$": self.schema(0)}
            return {"type": "object", "patternProperties": patterns, "additionalProperties": False}
        return {"type": "object", "additionalProperties": self.schema(depth - 1), "maxProperties": 3}

    def array(self, depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "array", "items": self.schema(depth - 1)}
        low = self._random.randrange(3)
        if self._random.random() < 0.5:
            schema["minItems"] = low
        if self._random.random() < 0.7:
            schema["maxItems"] = low + self._random.randrange(4)
        return schema

    def tuple(self, depth: int) -> dict[str, Any]:
        prefix = [self.schema(depth - 1) for _ in range(self._random.randrange(1, 4))]
        return {"type": "array", "prefixItems": prefix, "items": False, "minItems": len(prefix)}

    def any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.schema(depth - 1) for _ in range(self._random.randrange(1, 4))]}

    def one_of(self, depth: int) -> dict[str, Any]:
        tags = self._random.sample(["a", "b", "c", "d"], 2)
        return {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"tag": {"const": tag}, "value": self.schema(depth - 1)},
                    "required": ["tag", "value"],
                    "additionalProperties": False,
                }
                for tag in tags
            ]
        }

    def all_of(self, depth: int) -> dict[str, Any]:
        first, second = {"p": self.schema(0)}, {"q": self.schema(depth - 1)}
        return {
            "type": "object",
            "allOf": [{"properties": first, "required": ["p"]}, {"properties": second, "required": ["q"]}],
        }

    def recursive(self) -> dict[str, Any]:
        node = {
            "type": "object",
            "properties": {
                "value": self.schema(0),
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["value", self._random.choice(["next", "children"])],
            "additionalProperties": False,
        }
        return {"$defs": {"node": node}, "$ref": "#/$defs/node"}

    def with_definitions(self) -> dict[str, Any]:
        return {
            "definitions": {"first": self.schema(1), "second": {"$ref": "#/definitions/first"}},
            "type": "object",
            "properties": {"a": {"$ref": "#/definitions/second"}, "b": {"$ref": "#/definitions/first"}},
            "required": ["a"],
            "additionalProperties": False,
        }


def random_regex(seed: int) -> str:
    """A pattern that Python's `re` and Rust's `regex` read alike."""
    draw = random.Random(f"regex {seed}")

    def part(depth: int) -> str:
        atoms = [
            "[a-e]",
            "[^\\x00-\\x60]",
            "x",
            "[0-9]",
            "\\.",
            "[A-Z_]",
            "ab",
            "\\-",
            "é",
            "[α-ω]",
            "/",
            "\\\\",
        ]
        if depth == 0 or draw.random() < 0.4:
            return draw.choice(atoms) + draw.choice(["", "", "?", "+", "*", "{2}", "{1,3}", "{0,4}"])
        if draw.random() < 0.5:
            return "".join(part(depth - 1) for _ in range(draw.randrange(1, 4)))
        branches = "|".join(part(depth - 1) for _ in range(draw.randrange(2, 4)))
        return f"({branches})" + draw.choice(["", "?", "{1,2}", "*"])

    return draw.choice("abz9") + part(3)
