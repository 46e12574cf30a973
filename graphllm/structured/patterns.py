"""Regular expressions of requests: what is refused before the library sees them, and what it wants
otherwise.

Owns the caps on patterns. Their syntax is that of Rust's `regex` crate, and the library reads it;
lookaround and back-references do not exist there, and are complained about by it.
"""

from __future__ import annotations

import re

from graphllm.structured.compiled import grammar_error
from graphllm.structured.limits import GrammarLimits
from graphllm.structured.work_budget import (
    LARGE_COUNT,
    LITERAL_BYTES,
    PATTERN,
    PATTERN_CHARACTERS,
    UNICODE_CLASS,
    WorkBudget,
)

# One after the other: an escape (with a class's name), a bracketed class, the start of a group, its end, a
# counted repetition. Everything else is a plain character.
_PART = re.compile(
    r"\\p\{[^}]*\}|\\P\{[^}]*\}|\\.|\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\]|\(|\)|\{\d*(?:,\d*)?\}", re.DOTALL
)
_UNICODE_ESCAPES = ("\\p", "\\P", "\\w", "\\W")
_WHITESPACE_ATOMS = re.compile(r"\\[ntrs]|\\x(?:20|09|0[aAdD])|[ \t\r\n]")
_WHITESPACE_OPERATORS = re.compile(r"(?:[\[\]()|?*+,]|\?:|\{\d{1,3}(?:,\d{0,3})?\})*")


def check_pattern(pattern: str, name: str, *, limits: GrammarLimits, budget: WorkBudget) -> None:
    """Raises InvalidRequestError naming `name` for a pattern that would take too long to compile or match."""
    if len(pattern) > limits.max_regex_length:
        raise grammar_error(
            f"{name} has {len(pattern)} characters; at most {limits.max_regex_length} are allowed."
        )
    budget.spend(PATTERN + len(pattern) // PATTERN_CHARACTERS)
    budget.expect(len(pattern) // LITERAL_BYTES)
    # The product of repetitions inside each other: a frame for each open group.
    products = [1]
    closed = 1
    for match in _PART.finditer(pattern):
        part = match[0]
        if part == "(":
            products.append(1)
            if len(products) > limits.max_depth:
                raise grammar_error(f"{name} has more than {limits.max_depth} groups within groups.")
        elif part == ")":
            closed = products.pop() if len(products) > 1 else 1
            products[-1] = max(products[-1], closed)
        elif part.startswith("{"):
            is_of_group = pattern[match.start() - 1 : match.start()] == ")"
            total = largest_count(part) * (closed if is_of_group else 1)
            if total > limits.max_repeats:
                raise grammar_error(
                    f"{name} repeats something {total} times; at most {limits.max_repeats} are allowed."
                )
            if total >= LARGE_COUNT:
                budget.expect_many_states()
            products[-1] = max(products[-1], total)
        elif part.startswith(_UNICODE_ESCAPES) or (
            part.startswith("[") and any(e in part for e in _UNICODE_ESCAPES)
        ):
            budget.spend(UNICODE_CLASS)
            budget.expect_many_states()


def largest_count(repetition: str) -> int:
    """The larger bound of "{n}", "{n,}" or "{n,m}", at least 1. Bounds of more than nine digits count as
    huge.
    """
    bounds = [bound for bound in repetition.strip("{}").split(",") if bound]
    return max([1, *(int(bound) if len(bound) < 10 else 10**9 for bound in bounds)])


def whitespace_pattern(pattern: str) -> str:
    """A client's pattern for the whitespace between the parts of JSON, as the library wants it.

    Raises InvalidRequestError if anything but JSON's four whitespace characters might match.
    """
    rest = _WHITESPACE_ATOMS.sub("", pattern)
    if len(pattern) > 256 or not _WHITESPACE_OPERATORS.fullmatch(rest):
        raise grammar_error(
            f"whitespace_pattern {pattern!r:.80} must consist of JSON whitespace: blank, \\t, \\n, \\r "
            "or \\s, with [], (), |, ?, *, + and {n,m}."
        )
    return pattern.replace("\\s", "[ \\t\\n\\r]")
