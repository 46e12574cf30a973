"""Grammars in llguidance's dialect of Lark: checked piece by piece, and completed where they leave gaps.

Owns the reading of such a text into pieces, the caps on them, and two things that stand for something else:
`%json {schema}`, which is checked as any schema and given the whitespace rule, and `%marker "text"`, which
is the special token of that text where the vocabulary has one, and the text itself where it has none.
Whether the pieces make a grammar is the library's to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import NoReturn

from graphllm.structured.compiled import grammar_error
from graphllm.structured.json_schema import check_text_size, prepare_schema, read_json
from graphllm.structured.limits import GrammarLimits
from graphllm.structured.patterns import check_pattern, largest_count
from graphllm.structured.work_budget import (
    GRAMMAR_DEFINITION,
    GRAMMAR_ELEMENT,
    LARGE_COUNT,
    LITERAL_BYTES,
    SET_OPERATION,
    WorkBudget,
)

_PIECE = re.compile(
    r"""
      (?P<blank>\s+|//[^\n]*|\#[^\n]*)
    | (?P<string>"(?:[^"\\\n]|\\.)*"i?)
    | (?P<pattern>/(?:[^/\\\n]|\\.)+/[imslux]*)
    | %marker[ \t]*(?P<marker>"(?:[^"\\\n]|\\.)*")
    | %json\s*(?P<schema>(?=\{))
    | %(?P<data>regex|llguidance)\s*(?=\{)
    | (?P<special><[^<>\s]*>)
    | (?P<open>\()
    | (?P<close>\))
    | (?P<count>\{\s*\d*\s*(?:,\s*\d*\s*)?\}|~\s*\d+(?:\s*\.\.\s*\d+)?)
    | (?P<other>[\w@%.!?-]+|.)
    """,
    re.VERBOSE | re.DOTALL,
)


def lark_literal(text: str) -> str:
    """The text as a string literal of Lark."""
    return json.dumps(text, ensure_ascii=False)


def prepare_lark(
    text: str,
    *,
    special_tokens: Mapping[str, int],
    limits: GrammarLimits,
    budget: WorkBudget,
    whitespace: str,
    closes_objects: bool = True,
) -> str:
    """The text with `%json` and `%marker` completed. Raises InvalidRequestError for one above the limits."""
    check_text_size(text, "grammar", limits=limits)
    return "".join(_Preparation(text, special_tokens, limits, budget, whitespace, closes_objects).pieces())


class _Preparation:
    """One pass over a grammar's text."""

    def __init__(
        self,
        text: str,
        special_tokens: Mapping[str, int],
        limits: GrammarLimits,
        budget: WorkBudget,
        whitespace: str,
        closes_objects: bool,
    ) -> None:
        self._text = text
        self._special_tokens = special_tokens
        self._limits = limits
        self._budget = budget
        self._whitespace = whitespace
        self._closes_objects = closes_objects
        # The product of repetitions inside each other: a frame for each open group, and that of the last one.
        self._products = [1]
        self._closed = 1
        self._decoder = json.JSONDecoder()

    def pieces(self) -> Iterator[str]:
        position = 0
        previous = ""
        while (match := _PIECE.match(self._text, position)) is not None:
            kind, piece, position = str(match.lastgroup), match[0], match.end()
            if kind == "blank":
                yield piece
                continue
            self._budget.spend(GRAMMAR_ELEMENT)
            if kind in ("schema", "data"):
                end = self._end_of_json(position, match)
                yield self._data(kind, piece, self._text[position:end])
                position = end
            else:
                yield self._piece(kind, piece, match, previous)
            previous = kind

    def _piece(self, kind: str, piece: str, match: re.Match[str], previous: str) -> str:
        match kind:
            case "string":
                self._budget.expect(len(piece) // LITERAL_BYTES)
                if len(piece.encode()) > self._limits.max_literal_bytes:
                    self._refuse(match, f"is a literal of more than {self._limits.max_literal_bytes} bytes")
            case "pattern":
                pattern = piece[1 : piece.rindex("/")]
                check_pattern(pattern, f"grammar: /{pattern:.40}/", limits=self._limits, budget=self._budget)
            case "marker":
                return self._marker(match)
            case "open":
                self._products.append(1)
                if len(self._products) > self._limits.max_depth:
                    self._refuse(match, f"opens more than {self._limits.max_depth} groups within groups")
            case "close":
                self._closed = self._products.pop() if len(self._products) > 1 else 1
                self._products[-1] = max(self._products[-1], self._closed)
            case "count":
                bounds = re.sub(r"[~\s]", "", piece).replace("..", ",")
                total = largest_count(bounds) * (self._closed if previous == "close" else 1)
                if total > self._limits.max_repeats:
                    self._refuse(
                        match,
                        f"repeats something {total} times; at most {self._limits.max_repeats} are allowed",
                    )
                if total >= LARGE_COUNT:
                    self._budget.expect_many_states()
                self._products[-1] = max(self._products[-1], total)
            case "other" if piece == ":":
                self._budget.expect(GRAMMAR_DEFINITION)
            case "other" if piece in ("&", "~"):
                self._budget.expect(SET_OPERATION)
            case "other" if piece == "%lark" or piece.startswith("@"):
                self._refuse(match, "refers to another grammar, which is not supported")
        return piece

    def _marker(self, match: re.Match[str]) -> str:
        try:
            text = json.loads(match["marker"])
        except ValueError:
            self._refuse(match, "is no JSON string")
        token_id = self._special_tokens.get(text)
        return lark_literal(text) if token_id is None else f"<[{token_id}]>"

    def _end_of_json(self, position: int, match: re.Match[str]) -> int:
        try:
            return self._decoder.raw_decode(self._text, position)[1]
        except (ValueError, RecursionError) as error:
            self._refuse(match, f"is not followed by valid JSON: {error}")

    def _data(self, kind: str, piece: str, text: str) -> str:
        value = read_json(text, f"grammar: {piece.strip()}", limits=self._limits)
        if kind == "schema":
            name = "grammar: %json"
            return "%json " + prepare_schema(
                value,
                name,
                limits=self._limits,
                budget=self._budget,
                whitespace=self._whitespace,
                closes_objects=self._closes_objects,
            )
        # Every character may become a state.
        self._budget.spend(GRAMMAR_ELEMENT * (len(text) // 8))
        return piece + text

    def _refuse(self, match: re.Match[str], what: str) -> NoReturn:
        line = self._text.count("\n", 0, match.start()) + 1
        raise grammar_error(f"grammar, line {line}: {match[0].strip()!r:.60} {what}.")
