"""Requests meant to take long or to break something, at and above the limits; the benchmark has them too.

Each has a name. What becomes of one (refused, or served within the limits) is the tests' claim.
"""

from __future__ import annotations

import json
import random
from typing import Any

from graphllm.structured_outputs import StructuredOutputs

_DRAW = random.Random("hostile")


def _word(length: int = 8) -> str:
    return "".join(_DRAW.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(length))


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {
            "type": "object",
            "properties": {"a": schema},
            "required": ["a"],
            "additionalProperties": False,
        }
    return schema


def _tagged(count: int) -> list[dict[str, Any]]:
    return [
        {
            "type": "object",
            "properties": {"tag": {"const": _word()}, "n": {"type": "integer"}},
            "required": ["tag"],
        }
        for _ in range(count)
    ]


def _chain(keyword: str, length: int) -> dict[str, Any]:
    """Definitions that each refer to the next one twice: 2 ** length if they were written out."""
    definitions: dict[str, Any] = {
        f"d{i}": {keyword: [{"$ref": f"#/$defs/d{i + 1}"}, {"$ref": f"#/$defs/d{i + 1}"}]}
        for i in range(length)
    }
    return {"$defs": {**definitions, f"d{length}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def _schemas() -> dict[str, Any]:
    string = {"type": "string"}
    formats = ("date-time", "email", "hostname", "ipv6", "uri", "duration")
    return {
        "enum of words": {"enum": [_word() for _ in range(1_000)]},
        "enum of long words": {"enum": [_word(60) for _ in range(1_000)]},
        "enum of one long prefix": {"enum": ["x" * 3_000 + _word() for _ in range(20)]},
        "enum of objects": {"enum": [{_word(): [1, {_word(): None}]} for _ in range(40)]},
        "nesting": _nested(22),
        "deepest nesting": _nested(200),
        "optional properties": {"type": "object", "properties": {_word(): string for _ in range(300)}},
        "ranges": {
            "properties": {
                _word(): {"type": "number", "minimum": -i * 1.23, "maximum": 7.5 * i + 9} for i in range(80)
            }
        },
        "formats": {"properties": {_word(): {"type": "string", "format": formats[i % 6]} for i in range(70)}},
        "patterns": {
            "properties": {
                _word(): {"type": "string", "pattern": f"^{_word(4)}.*x{{1,{i}}}"} for i in range(1, 150)
            }
        },
        "anyOf": {"anyOf": _tagged(60)},
        "oneOf": {"oneOf": _tagged(25)},
        "anyOf of patterns": {
            "anyOf": [{"type": "string", "pattern": f"^{_word()}.*{_word()}$"} for _ in range(150)]
        },
        "anyOf within allOf": {
            "allOf": [{"anyOf": [{"properties": {_word(): string}} for _ in range(5)]} for _ in range(4)]
        },
        "allOf chain": _chain("allOf", 40),
        "anyOf chain": _chain("anyOf", 40),
        "oneOf chain": _chain("oneOf", 30),
        "required recursion": {
            "$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]}},
            "$ref": "#/$defs/a",
        },
        "many items": {
            "type": "array",
            "minItems": 1_000_000,
            "items": {"type": "array", "minItems": 1_000_000},
        },
        "long string": {"type": "string", "minLength": 999_999, "maxLength": 1_000_000},
        "pattern and length": {"type": "string", "maxLength": 2_000, "pattern": "^(a|b|[c-z]+)*x.{10}$"},
        "divisor": {"type": "integer", "multipleOf": 4_001},
        "divisor in a range": {"type": "integer", "multipleOf": 4_096, "minimum": 3, "maximum": 10**17},
        "divisors together": {"allOf": [{"multipleOf": 97}, {"multipleOf": 91}, {"multipleOf": 89}]},
        "pattern properties": {
            "patternProperties": {f"^{c}[a-z]{{1,300}}$": string for c in "abcdefghijkl"},
            "additionalProperties": False,
        },
        "long constant": {"const": "hello world " * 340},
        "constant of other letters": {"const": "\u2603é" * 800},
        "brackets": "[" * 60_000,
        "digits": "1" * 60_000,
    }


def _regexes() -> dict[str, str]:
    return {
        "counted": "a{1,1000}",
        "counted twice": "(a{1,90}b){1,100}",
        "nested stars": "((a*)*)*",
        "plus of plus": "(x+x+)+y",
        "optional run": "(a?){200}a{200}",
        "exponential automaton": "(a|b)*a(a|b){200}",
        "dots and counts": "(.{0,50}a){20}",
        "intersecting dots": "(.*(a|b).*(c|d).*){8}",
        "letters": "\\p{L}{1,2000}",
        "letters and marks": "[\\p{L}\\p{N}\\p{P}]{5,500}",
        "words": "(\\w{1,50}\\s){1,50}",
        "any case": "(?i)(" + "|".join(_word() for _ in range(200)) + ")",
        "alternatives": "|".join(_word() for _ in range(220)),
        "alternatives with dots": "|".join(f".*{_word(3)}.*" for _ in range(200)),
        "overlapping": "(a|aa|aaa|aaaa){1,500}",
        "two letters": "é☃" * 1_000,
        "groups": "(?:" * 45 + "a" + ")?" * 45,
        "doubled": "((((((((a{1,2}){1,2}){1,2}){1,2}){1,2}){1,2}){1,2}){1,2})",
    }


def _grammars() -> dict[str, str]:
    doubled_terminals = "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(40))
    doubled_rules = "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(60))
    repeated_rules = "\n".join(f"r{i}: r{i + 1}{{0,100}}" for i in range(30))
    return {
        "right recursion": 'start: "a" start | "b" start | ""',
        "ambiguity": 'start: e\ne: e e | "a" | "b"',
        "more ambiguity": 'start: e\ne: e e e | /[a-c]/ | e e | e "a" e',
        "characters": "start: c*\nc: /./ | /[a-z]/ | /\\w/",
        "empty repeats": 'start: (("a"?){90} "b"?){90}',
        "doubled terminals": f'start: T0\n{doubled_terminals}\nT40: "x"',
        "doubled rules": f'start: r0\n{doubled_rules}\nr60: "x"',
        "repeated rules": f'start: r0\n{repeated_rules}\nr30: "x" | ""',
        "many rules": "start: r0\n"
        + "\n".join(f'r{i}: "{_word()}" r{i + 1} | "{_word()}" r{i * 7 % 250}' for i in range(250))
        + '\nr250: "x"',
        "intersections": "start: A\nA: " + " & ".join(f"/(?s:.*){_word(3)}(?s:.*)/" for _ in range(12)),
        "negations": "start: A\nA: " + " & ".join(f"~/(?s:.*){_word(3)}(?s:.*)/" for _ in range(30)),
        "substrings": 'start: %regex {"substring_chars": ' + json.dumps(_word(12_000)) + "}",
        "many schemas": "start: " + " ".join('%json {"type": "object"}' for _ in range(150)),
        "gbnf": 'root ::= ("a" | "aa" | root root | "")*',
    }


def hostile_requests() -> dict[str, StructuredOutputs]:
    """Name to request."""
    found = {f"schema: {name}": StructuredOutputs(json=schema) for name, schema in _schemas().items()}
    found |= {f"regex: {name}": StructuredOutputs(regex=regex) for name, regex in _regexes().items()}
    found |= {f"grammar: {name}": StructuredOutputs(grammar=grammar) for name, grammar in _grammars().items()}
    found["choice: many"] = StructuredOutputs(choice=tuple(_word(20) for _ in range(1_000)))
    found["choice: one long prefix"] = StructuredOutputs(
        choice=tuple("x" * 1_200 + _word() for _ in range(50))
    )
    found["choice: prefixes"] = StructuredOutputs(choice=tuple("a" * length for length in range(1, 340)))
    found["start: short"] = StructuredOutputs(
        regex="[a-z]+", starts_after=("e", "t", "a", "o", "i", "n", "s", "r")
    )
    found["start: long"] = StructuredOutputs(regex="[a-z]+", starts_after=tuple(_word(256) for _ in range(8)))
    return found
