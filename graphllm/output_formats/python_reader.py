"""Reading calls that are written in Python, `f(a=1, b="x")`, as Llama 4 and others do.

Owns the literals of Python that stand for JSON values, and the call around them. Nothing is evaluated: a
literal becomes JSON text as it comes, with a stack of brackets instead of recursion. JSON's literals are
read too. https://docs.python.org/3/reference/lexical_analysis.html#literals
"""

from __future__ import annotations

import json
import re

from graphllm.output_formats.argument_values import json_string_content
from graphllm.output_formats.call_readers import MAX_NAME_CHARS, Progress
from graphllm.output_formats.json_scanner import MAX_DEPTH, escaped_control, is_json
from graphllm.output_formats.markers import end_of_blanks
from graphllm.output_formats.output import EventList

MAX_WORD_CHARS = 400
"""Most characters of a number or word."""

_WORD_RUN = re.compile(r"[\w.+-]*")
_STRING_RUN = re.compile(r"[^\"'\\\x00-\x1f]*")
_IDENTIFIER_RUN = re.compile(r"[\w.]*")
_NUMBER = re.compile(r"[+-]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][+-]?\d+)?", re.ASCII)
_HEX_NUMBER = re.compile(r"0[xX][0-9a-fA-F]{1,64}")
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_CLOSERS = {"[": "]", "(": ")", "{": "}"}
# What stands for itself, and Python's escapes that JSON spells otherwise. "\/" is JSON's.
_ESCAPES = {
    **{"n": "\\n", "t": "\\t", "r": "\\r", "b": "\\b", "f": "\\f", "\\": "\\\\", '"': '\\"', "'": "'"},
    **{"/": "/", "a": "\\u0007", "v": "\\u000b", "\n": ""},
}
_LONG_ESCAPE = re.compile(r"x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{1,3}")
_ESCAPE_LENGTHS = {"x": 3, "u": 5, "U": 9} | dict.fromkeys("01234567", 3)


class PythonValue:
    """Reads one literal and gives it as JSON."""

    __slots__ = ("_closers", "_expects", "_needs_comma", "_quote", "_word", "is_broken", "is_done")

    def __init__(self) -> None:
        self.is_done = False
        self.is_broken = False
        self._closers: list[str] = []
        self._expects = "value"
        self._needs_comma = False
        """Whether an element came before the next one: Python allows a comma before the closing bracket."""
        self._quote = ""
        self._word = ""

    def read(self, text: str, position: int, out: list[str], *, is_last: bool) -> int:
        """Reads on; appends JSON to `out`, gives the place behind. Up to nine characters wait for more."""
        while position < len(text) and not self.is_done and not self.is_broken:
            before = position
            if self._expects == "string":
                position = self._read_string(text, position, out, is_last=is_last)
            elif self._expects == "word":
                position = self._read_word(text, position, out)
            else:
                position = end_of_blanks(text, position)
                if position < len(text):
                    position = self._read_structure(text, position, out, is_last=is_last)
            if position == before and self._expects not in ("after", "colon") and not self.is_done:
                break
        return position

    def _end_value(self) -> None:
        if self._expects_key:
            self._expects = "colon"
        else:
            self._expects = "after"
            self.is_done = not self._closers

    @property
    def _expects_key(self) -> bool:
        return bool(self._closers) and self._closers[-1] == "key"

    def _read_structure(self, text: str, position: int, out: list[str], *, is_last: bool) -> int:
        char = text[position]
        if self._expects == "colon" and char == ":":
            self._closers[-1] = "}"
            self._expects = "value"
            out.append(": ")
        elif self._expects == "after" and char == ",":
            if self._closers[-1] == "}":
                self._closers[-1] = "key"
            self._expects = "value"
            self._needs_comma = True
            return position + 1
        elif self._closes(char):
            out.append("}" if char == "}" else "]")
            self._closers.pop()
            self._needs_comma = False
            self._end_value()
        elif self._expects == "value":
            return self._begin_value(text, position, out, is_last=is_last)
        else:
            self.is_broken = True
            return position
        return position + 1

    def _closes(self, char: str) -> bool:
        """Whether `char` closes the innermost bracket: not between a key and its value."""
        if not self._closers or char not in ")]}" or self._expects == "colon":
            return False
        innermost = "}" if self._closers[-1] == "key" else self._closers[-1]
        # A value must follow a colon, a comma or nothing may precede the bracket.
        is_after_colon = self._expects == "value" and self._closers[-1] == "}"
        return char == innermost and not is_after_colon

    def _begin_value(self, text: str, position: int, out: list[str], *, is_last: bool) -> int:
        char = text[position]
        if char in "\"'":
            if len(text) - position < 3 and not is_last and text[position:] in (char, char * 2):
                return position
            self._quote = char * 3 if text.startswith(char * 3, position) else char
            self._give_comma(out)
            out.append('"')
            self._expects = "string"
            return position + len(self._quote)
        if self._expects_key:
            self.is_broken = True
        elif char in _CLOSERS:
            if len(self._closers) == MAX_DEPTH:
                self.is_broken = True
                return position
            self._give_comma(out)
            out.append("{" if char == "{" else "[")
            self._closers.append("key" if char == "{" else _CLOSERS[char])
            return position + 1
        elif char.isalnum() or char in "+-._":
            self._give_comma(out)
            self._expects, self._word = "word", ""
            return self._read_word(text, position, out)
        else:
            self.is_broken = True
        return position

    def _give_comma(self, out: list[str]) -> None:
        if self._needs_comma:
            out.append(", ")
            self._needs_comma = False

    def _read_word(self, text: str, position: int, out: list[str]) -> int:
        found = _WORD_RUN.match(text, position, position + MAX_WORD_CHARS + 1 - len(self._word))
        assert found is not None
        self._word += found.group()
        if len(self._word) > MAX_WORD_CHARS:
            self.is_broken = True
        elif found.end() < len(text):
            value = word_as_json(self._word)
            if value is None:
                self.is_broken = True
            else:
                out.append(value)
                self._end_value()
        return found.end()

    def _read_string(self, text: str, position: int, out: list[str], *, is_last: bool) -> int:
        found = _STRING_RUN.match(text, position)
        assert found is not None
        out.append(found.group())
        position = found.end()
        if position == len(text):
            return position
        char = text[position]
        if char == "\\":
            return self._read_escape(text, position, out, is_last=is_last)
        if char == self._quote[0]:
            if len(self._quote) == 3 and not text.startswith(self._quote, position):
                if (
                    len(text) - position < 3
                    and not is_last
                    and text[position:] == char * (len(text) - position)
                ):
                    return position
            else:
                out.append('"')
                self._end_value()
                return position + len(self._quote)
        if char == '"':
            out.append('\\"')
        else:
            out.append(char if char == "'" else escaped_control(char))
        return position + 1

    def _read_escape(self, text: str, position: int, out: list[str], *, is_last: bool) -> int:
        if position + 1 == len(text):
            return position + 1 if is_last else position
        char = text[position + 1]
        length = _ESCAPE_LENGTHS.get(char)
        if length is None:
            # An unknown escape is a backslash and what follows it.
            out.append(_ESCAPES.get(char, "\\\\"))
            return position + (2 if char in _ESCAPES else 1)
        if len(text) - position - 1 < length and not is_last:
            return position
        found = _LONG_ESCAPE.match(text, position + 1)
        code = -1
        if found is not None:
            digits = found.group()
            code = int(digits, 8) if digits[0] in "01234567" else int(digits[1:], 16)
        if found is None or code > 0x10FFFF or (char == "U" and 0xD800 <= code < 0xE000):
            self.is_broken = True
            return position
        # Halves of a pair of surrogates are spelled as they came: JSON joins them.
        is_half = 0xD800 <= code < 0xE000
        out.append(f"\\u{code:04x}" if is_half else json_string_content(chr(code)))
        return found.end()


def word_as_json(word: str) -> str | None:
    """A number, True, False or None as JSON; None for other words."""
    if word in _WORDS:
        return _WORDS[word]
    if _HEX_NUMBER.fullmatch(word):
        return str(int(word, 16))
    if not _NUMBER.fullmatch(word):
        return None
    number = word.replace("_", "").lstrip("+")
    if "." in number:
        whole, _, rest = number.partition(".")
        sign, digits = ("-", whole[1:]) if whole.startswith("-") else ("", whole)
        rest = rest if rest[:1].isdigit() else "0" + rest
        number = f"{sign}{digits or '0'}.{rest}"
    return number if is_json(number) else None


class PythonCallReader:
    """Reads `f(a=1)`. A call is announced when its first argument, or its end, can be seen."""

    __slots__ = (
        "_events",
        "_keyword",
        "_name",
        "_num_arguments",
        "_out",
        "_phase",
        "_value",
        "has_started",
        "open_depth",
        "progress",
    )

    def __init__(self, events: EventList) -> None:
        self.progress = Progress.READING
        self.has_started = False
        self.open_depth = 0
        self._events = events
        self._phase = "name"
        self._name = ""
        self._keyword = ""
        self._num_arguments = 0
        self._value = PythonValue()
        self._out: list[str] = []

    def read(self, text: str, position: int, *, is_last: bool) -> int:
        while position < len(text) and self.progress is Progress.READING:
            if self._phase == "value":
                before = position
                position = self._value.read(text, position, self._out, is_last=is_last)
                self._events.add_arguments("".join(self._out))
                self._out = []
                if self._value.is_broken:
                    self.progress = Progress.BROKEN
                elif self._value.is_done:
                    self._phase = "after"
                elif position == before:
                    break
            elif self._phase in ("name", "keyword"):
                position = self._read_identifier(text, position)
            else:
                position = end_of_blanks(text, position)
                if position < len(text):
                    position += self._takes(text[position])
        return position

    def _read_identifier(self, text: str, position: int) -> int:
        known = self._name if self._phase == "name" else self._keyword
        found = _IDENTIFIER_RUN.match(text, position, position + MAX_NAME_CHARS + 1 - len(known))
        assert found is not None
        if self._phase == "name":
            self._name += found.group()
        else:
            self._keyword += found.group()
        if len(known) + len(found.group()) > MAX_NAME_CHARS:
            self.progress = Progress.BROKEN
        elif found.end() < len(text):
            self._phase = "open" if self._phase == "name" else "equals"
        return found.end()

    def _takes(self, char: str) -> bool:
        """One character of the call's own; false where it is left to what comes next."""
        phase = self._phase
        if phase == "open" and char == "(" and self._events.may_call(self._name):
            self._phase = "first"
        elif phase == "equals" and char == "=" and self._keyword.isidentifier():
            self._begin_argument()
        elif phase == "after" and char == ",":
            self._phase = "next"
        elif phase in ("first", "next", "after") and char == ")":
            self._start()
            self._events.add_arguments("}" if self._num_arguments else "{}")
            self._events.end_call()
            self.progress = Progress.DONE
        elif phase in ("first", "next") and (char.isalpha() or char == "_"):
            self._phase, self._keyword = "keyword", ""
            return False
        else:
            self.progress = Progress.BROKEN
            return False
        return True

    def _start(self) -> None:
        if not self.has_started:
            self._events.start_call(self._name, None)
            self.has_started = True

    def _begin_argument(self) -> None:
        self._start()
        opening = ", " if self._num_arguments else "{"
        self._events.add_arguments(f"{opening}{json.dumps(self._keyword, ensure_ascii=False)}: ")
        self._num_arguments += 1
        self._value = PythonValue()
        self._phase = "value"
