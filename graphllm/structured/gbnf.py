"""Grammars in GBNF, as llama.cpp and xgrammar read them ("EBNF"), rewritten as Lark.

Owns the reading of GBNF. The format: https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md.

Lark splits a text into terminals before it parses, and GBNF does not. Rules that neither refer to
themselves nor to a rule that does become terminals, and a repeated character class becomes one, which is
what makes them fast. A terminal takes as many characters as it can, so where GBNF could also have stopped
earlier the output follows the longest way: every output is one of the grammar, though not every text of the
grammar can be an output.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

from graphllm.structured.compiled import grammar_error

_RULE_START = re.compile(r"(?:\s|#[^\n]*(?:\n|\Z))*[A-Za-z_][\w-]*[ \t]*::=")
_PIECE = re.compile(
    r"""
      (?P<newline>\r?\n)
    | (?P<blank>[ \t]+|\#[^\n]*)
    | (?P<definition>[A-Za-z_][\w-]*[ \t]*::=)
    | (?P<name>[A-Za-z_][\w-]*)
    | (?P<string>"(?:[^"\\\n]|\\.)*")
    | (?P<class>\[\^?(?:[^\]\\\n]|\\.)*\])
    | (?P<any>\.)
    | (?P<special><[^<>\s]*>)
    | (?P<repeat>[*+?]|\{\s*\d+\s*(?:,\s*\d*\s*)?\})
    | (?P<structure>[()|])
    """,
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))", re.DOTALL)
_PLAIN_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"} | {c: c for c in '"\\[]-^/'}
_IN_TERMINALS = frozenset({"string", "class", "any", "repeat", "structure", "name"})


@dataclass(frozen=True, slots=True)
class _Piece:
    kind: str
    text: str
    line: int


@dataclass(slots=True)
class _Rule:
    name: str
    pieces: list[_Piece]

    @property
    def references(self) -> set[str]:
        return {piece.text for piece in self.pieces if piece.kind == "name"}


def is_gbnf(text: str) -> bool:
    """Whether the first rule is written as in GBNF, `name ::= ...`."""
    return _RULE_START.match(text) is not None


def gbnf_to_lark(text: str) -> str:
    """The grammar as Lark, whose `start` is the rule `root`. Raises InvalidRequestError naming the line."""
    rules = _read_rules(text)
    if "root" not in rules:
        raise grammar_error("grammar: there is no rule named root.")
    for rule in rules.values():
        for piece in rule.pieces:
            if piece.kind == "name" and piece.text not in rules:
                _refuse(piece.line, f"{piece.text!r} is not defined")
    terminals = _find_terminals(rules)
    names = {name: f"{'T' if name in terminals else 'r'}{number}" for number, name in enumerate(rules)}
    lines = [f"start: {names['root']}"]
    for rule in rules.values():
        body = " ".join(_translate(rule, names, is_terminal=rule.name in terminals))
        lines.append(f"{names[rule.name]}: {body}  // {rule.name}")
    return "\n".join(lines) + "\n"


def _read_rules(text: str) -> dict[str, _Rule]:
    rules: dict[str, _Rule] = {}
    rule: _Rule | None = None
    depth = 0
    is_line_over = False
    for piece in _pieces(text):
        if piece.kind == "newline":
            is_line_over = True
            continue
        if piece.kind == "definition":
            if depth:
                _refuse(piece.line, "a rule begins while a group is open")
            name = piece.text[:-3].rstrip()
            if name in rules:
                _refuse(piece.line, f"{name!r} is defined twice")
            rules[name] = rule = _Rule(name, [])
            is_line_over = False
            continue
        goes_on = depth > 0 or piece.text == "|" or (rule is not None and _is_open(rule))
        if rule is None or (is_line_over and not goes_on):
            _refuse(piece.line, f"{piece.text!r:.40} belongs to no rule")
        is_line_over = False
        depth += {"(": 1, ")": -1}.get(piece.text, 0) if piece.kind == "structure" else 0
        if depth < 0:
            _refuse(piece.line, "a group is closed that was not opened")
        if piece.kind == "repeat" and (not rule.pieces or rule.pieces[-1].text in ("(", "|")):
            _refuse(piece.line, f"there is nothing for {piece.text!r} to repeat")
        rule.pieces.append(piece)
    if depth:
        raise grammar_error("grammar: a group is not closed.")
    return rules


def _is_open(rule: _Rule) -> bool:
    """Whether the rule cannot have ended with its last line."""
    return not rule.pieces or rule.pieces[-1].text == "|"


def _pieces(text: str) -> Iterator[_Piece]:
    position, line = 0, 1
    while position < len(text):
        match = _PIECE.match(text, position)
        if match is None:
            _refuse(line, f"{text[position : position + 20]!r} is not understood")
        kind = str(match.lastgroup)
        if kind != "blank":
            yield _Piece(kind, match[0], line)
        line += match[0].count("\n")
        position = match.end()


def _find_terminals(rules: Mapping[str, _Rule]) -> set[str]:
    """Rules that are patterns: without special tokens, and without a way back to themselves."""
    waiting = {
        name: set(rule.references)
        for name, rule in rules.items()
        if all(piece.kind in _IN_TERMINALS for piece in rule.pieces)
    }
    users: dict[str, list[str]] = {}
    for name, references in waiting.items():
        for reference in references:
            users.setdefault(reference, []).append(name)
    ready = [name for name, references in waiting.items() if not references]
    terminals = set(ready)
    while ready:
        name = ready.pop()
        for user in users.get(name, ()):
            waiting[user].discard(name)
            if not waiting[user] and user not in terminals:
                terminals.add(user)
                ready.append(user)
    return terminals


def _translate(rule: _Rule, names: Mapping[str, str], *, is_terminal: bool) -> Iterator[str]:
    if _is_open(rule):
        yield '""'
    pieces = rule.pieces
    position = 0
    while position < len(pieces):
        piece = pieces[position]
        position += 1
        repeat = pieces[position] if position < len(pieces) and pieces[position].kind == "repeat" else None
        if piece.kind in ("class", "any"):
            pattern = _class_pattern(piece) if piece.kind == "class" else "(?s:.)"
            if repeat is None or is_terminal:
                yield f"/{pattern}/"
            else:
                position += 1
                yield _repeated(pattern, repeat.text)
        elif piece.kind == "string":
            yield json.dumps(_unescape(piece.text[1:-1], piece.line), ensure_ascii=False)
        elif piece.kind == "name":
            yield names[piece.text]
        elif piece.text == "|" and (position == 1 or pieces[position - 2].text in ("(", "|")):
            yield '"" |'
        elif piece.text == ")" and pieces[position - 2].text in ("(", "|"):
            yield '"" )'
        else:
            yield piece.text


def _repeated(pattern: str, repeat: str) -> str:
    """A repeated class as one terminal, which must not be empty."""
    if repeat in ("*", "?"):
        return f"(/{pattern}{'+' if repeat == '*' else ''}/)?"
    bounds = re.sub(r"\s", "", repeat)
    if bounds.startswith("{0"):
        low, _, high = bounds.strip("{}").partition(",")
        if int(low) == 0:
            return f"(/{pattern}{{1,{high}}}/)?" if high != "0" and "," in bounds else '""'
    return f"/{pattern}{bounds}/"


def _class_pattern(piece: _Piece) -> str:
    """`[^a-z\\n]` with every character that a pattern could misread written as its code."""
    body = piece.text[1:-1]
    negation = "^" if body.startswith("^") else ""
    body = body[len(negation) :]
    if not body:
        _refuse(piece.line, "a character class is empty")
    written = ""
    position = 0
    while position < len(body):
        escape = _ESCAPE.match(body, position)
        character = _unescape(escape[0], piece.line) if escape else body[position]
        is_range = not escape and character == "-" and 0 < position < len(body) - 1
        written += "-" if is_range else _character(character)
        position = escape.end() if escape else position + 1
    return f"[{negation}{written}]"


def _character(character: str) -> str:
    return character if character.isalnum() and character.isascii() else f"\\x{{{ord(character):X}}}"


def _unescape(text: str, line: int) -> str:
    def replace(match: re.Match[str]) -> str:
        code = match[1] or match[2] or match[3]
        if code is None:
            if match[4] not in _PLAIN_ESCAPES:
                _refuse(line, f"the escape \\{match[4]} is not understood")
            return _PLAIN_ESCAPES[match[4]]
        number = int(code, 16)
        if number > 0x10FFFF or 0xD800 <= number < 0xE000:
            _refuse(line, f"there is no character U+{number:X}")
        return chr(number)

    return _ESCAPE.sub(replace, text)


def _refuse(line: int, what: str) -> NoReturn:
    raise grammar_error(f"grammar, line {line}: {what}.")
