"""One JSON value, read as it comes.

Owns what is JSON (RFC 8259) and where a value ends; keeps a stack instead of recursing and looks at a
character once. Knows nothing of calls. Values are not built: what comes out is text.
"""

from __future__ import annotations

import re
from enum import IntEnum

MAX_DEPTH = 128
"""Most objects and arrays within each other; what lies deeper is not read as JSON."""

_STRING_RUN = re.compile(r'[^"\\\x00-\x1f]*')
_BLANK_RUN = re.compile(r"[ \t\r\n]*")
_HEX_DIGITS = frozenset("0123456789abcdefABCDEF")
_LITERALS = {"t": "true", "f": "false", "n": "null"}

# A number's automaton: what was read last, and what a character makes of it.
_NUMBER_STEPS = {
    "-": {"0": "zero", "1-9": "whole"},
    "zero": {".": "point", "e": "e"},
    "whole": {"0": "whole", "1-9": "whole", ".": "point", "e": "e"},
    "point": {"0": "fraction", "1-9": "fraction"},
    "fraction": {"0": "fraction", "1-9": "fraction", "e": "e"},
    "e": {"0": "exponent", "1-9": "exponent", "-": "sign", "+": "sign"},
    "sign": {"0": "exponent", "1-9": "exponent"},
    "exponent": {"0": "exponent", "1-9": "exponent"},
}
_NUMBER_CLASSES = {"0": "0", ".": ".", "e": "e", "E": "e", "-": "-", "+": "+"} | dict.fromkeys(
    "123456789", "1-9"
)
_WHOLE_NUMBERS = frozenset({"zero", "whole", "fraction", "exponent"})


class _State(IntEnum):
    VALUE = 0
    FIRST_ELEMENT = 1
    FIRST_KEY = 2
    KEY = 3
    COLON = 4
    AFTER_VALUE = 5
    STRING = 6
    ESCAPE = 7
    HEX = 8
    LITERAL = 9
    NUMBER = 10
    DONE = 11
    BROKEN = 12


class JsonScanner:
    """Reads one value. Its text comes out as it was written, but for raw control characters in strings.

    Models write line breaks into strings, which JSON forbids: they come out escaped. With `is_strict`
    they break the value instead.
    """

    __slots__ = ("_closers", "_is_key", "_is_strict", "_literal", "_number", "_state")

    def __init__(self, *, is_strict: bool = False) -> None:
        self._state = _State.VALUE
        self._closers: list[str] = []
        self._is_strict = is_strict
        self._is_key = False
        self._literal = ""
        self._number = ""

    @property
    def is_done(self) -> bool:
        """The value is whole; the next character does not belong to it."""
        return self._state is _State.DONE

    @property
    def is_broken(self) -> bool:
        """The next character cannot stand where it does."""
        return self._state is _State.BROKEN

    def read(self, text: str, position: int, out: list[str]) -> int:
        """Reads on from `position`; appends what belongs to the value to `out`, gives the place behind.

        Stops at the end of the text, of the value, or before the character that breaks it.
        """
        length = len(text)
        start = position
        while position < length and self._state < _State.DONE:
            state = self._state
            if state is _State.STRING:
                found = _STRING_RUN.match(text, position)
                assert found is not None
                position = found.end()
                if position < length and text[position] < " ":
                    if self._is_strict:
                        self._state = _State.BROKEN
                        break
                    out.append(text[start:position])
                    out.append(escaped_control(text[position]))
                    position += 1
                    start = position
                elif position < length:
                    self._end_string_run(text[position])
                    position += 1
            elif state is _State.NUMBER:
                position = self._read_number(text, position)
            elif state is _State.LITERAL or state is _State.HEX or state is _State.ESCAPE:
                position += self._takes_inner(text[position])
            else:
                found = _BLANK_RUN.match(text, position)
                assert found is not None
                position = found.end()
                if position < length:
                    position += self._takes_structure(text[position])
        if position > start:
            out.append(text[start:position])
        return position

    def finish(self) -> None:
        """Nothing comes any more: a number by itself is whole now."""
        if self._state is _State.NUMBER and not self._closers and self._number in _WHOLE_NUMBERS:
            self._state = _State.DONE

    def _end_string_run(self, char: str) -> None:
        if char == "\\":
            self._state = _State.ESCAPE
        elif self._is_key:
            self._is_key = False
            self._state = _State.COLON
        else:
            self._end_value()

    def _end_value(self) -> None:
        self._state = _State.AFTER_VALUE if self._closers else _State.DONE

    def _takes_inner(self, char: str) -> bool:
        """One character of a literal or an escape."""
        if self._state is _State.ESCAPE:
            if char == "u":
                self._state, self._literal = _State.HEX, "four"
                return True
            self._state = _State.STRING if char in '"\\/bfnrt' else _State.BROKEN
        elif self._state is _State.HEX:
            if char not in _HEX_DIGITS:
                self._state = _State.BROKEN
            else:
                self._literal = self._literal[1:]
                if not self._literal:
                    self._state = _State.STRING
        elif char != self._literal[0]:
            self._state = _State.BROKEN
        else:
            self._literal = self._literal[1:]
            if not self._literal:
                self._end_value()
        return self._state is not _State.BROKEN

    def _read_number(self, text: str, position: int) -> int:
        while position < len(text):
            kind = _NUMBER_CLASSES.get(text[position])
            following = None if kind is None else _NUMBER_STEPS[self._number].get(kind)
            if following is None:
                if self._number in _WHOLE_NUMBERS and kind is None:
                    self._end_value()
                else:
                    self._state = _State.BROKEN
                break
            self._number = following
            position += 1
        return position

    def _takes_structure(self, char: str) -> bool:
        """One character outside strings, numbers and words; false where it breaks the value."""
        state = self._state
        if state is _State.COLON and char == ":":
            self._state = _State.VALUE
        elif state is _State.AFTER_VALUE and char == ",":
            self._state = _State.KEY if self._closers[-1] == "}" else _State.VALUE
        elif char in "}]" and state in (_State.AFTER_VALUE, _State.FIRST_KEY, _State.FIRST_ELEMENT):
            if char != self._closers[-1]:
                self._state = _State.BROKEN
                return False
            self._closers.pop()
            self._end_value()
        elif state in (_State.KEY, _State.FIRST_KEY) and char == '"':
            self._state, self._is_key = _State.STRING, True
        elif state in (_State.VALUE, _State.FIRST_ELEMENT):
            self._begin_value(char)
        else:
            self._state = _State.BROKEN
        return self._state is not _State.BROKEN

    def _begin_value(self, char: str) -> None:
        if char in "{[":
            if len(self._closers) == MAX_DEPTH:
                self._state = _State.BROKEN
                return
            self._closers.append("}" if char == "{" else "]")
            self._state = _State.FIRST_KEY if char == "{" else _State.FIRST_ELEMENT
        elif char == '"':
            self._state = _State.STRING
        elif char in _LITERALS:
            self._state, self._literal = _State.LITERAL, _LITERALS[char][1:]
        elif char == "-" or char in "0123456789":
            self._state = _State.NUMBER
            self._number = {"-": "-", "0": "zero"}.get(char, "whole")
        else:
            self._state = _State.BROKEN


_SHORT_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\b": "\\b", "\f": "\\f"}


def escaped_control(char: str) -> str:
    """A control character below U+0020 as JSON strings write it."""
    return _SHORT_ESCAPES.get(char) or f"\\u{ord(char):04x}"


def is_json(text: str) -> bool:
    """Whether `text` is one JSON value, blanks around it aside, no deeper than MAX_DEPTH."""
    scanner = JsonScanner(is_strict=True)
    text = text.strip(" \t\r\n")
    end = scanner.read(text, 0, [])
    scanner.finish()
    return scanner.is_done and end == len(text)


_BRACKET = re.compile(r'["\\{}\[\]\n]')


class BracketCounter:
    """Passes over the rest of a JSON text of which some brackets are open.

    Looks at brackets and quotes only. Gives up at a line break inside a string: that is no JSON.
    """

    __slots__ = ("_depth", "_is_escaped", "_is_in_string", "is_over")

    def __init__(self, depth: int) -> None:
        """depth: how many brackets are open; nothing is passed over where none is."""
        self._depth = depth
        self._is_in_string = False
        self._is_escaped = False
        self.is_over = depth == 0

    def read(self, text: str, position: int) -> int:
        """Reads on; gives the place behind what belongs to the JSON text."""
        if self._is_escaped and position < len(text):
            self._is_escaped = False
            position += 1
        while not self.is_over:
            found = _BRACKET.search(text, position)
            if found is None:
                return len(text)
            char = found.group()
            position = found.end()
            if char == '"':
                self._is_in_string = not self._is_in_string
            elif self._is_in_string:
                if char == "\n":
                    self.is_over = True
                elif char == "\\":
                    self._is_escaped = position == len(text)
                    position += position < len(text)
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                self.is_over = self._depth == 0
        return position
