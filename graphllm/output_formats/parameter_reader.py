"""Reading a call whose arguments stand between markers one by one, as GLM and Qwen3-Coder write them.

Owns putting them together to a JSON object. Strings are given on as they come, the rest when it is whole,
since only then it is known to be JSON.
"""

from __future__ import annotations

import json

from graphllm.output_formats.argument_values import (
    argument_as_json,
    argument_kinds,
    is_only_string,
    json_string_content,
)
from graphllm.output_formats.call_readers import MAX_NAME_CHARS, Progress
from graphllm.output_formats.markers import Markers, end_of_blanks, markers
from graphllm.output_formats.named_call_reader import NameReader
from graphllm.output_formats.output import EventList
from graphllm.output_formats.syntax import ParameterCall


class ParameterCallReader:
    """Reads a name, then key and value by turns. The text that ends the call is left where it is."""

    __slots__ = (
        "_events",
        "_held",
        "_is_first_piece",
        "_key",
        "_key_end",
        "_kinds",
        "_name",
        "_next",
        "_num_arguments",
        "_phase",
        "_syntax",
        "_value_begin",
        "_value_end",
        "_value_pieces",
        "has_started",
        "open_depth",
        "progress",
    )

    def __init__(self, syntax: ParameterCall, events: EventList) -> None:
        self.progress = Progress.READING
        self.has_started = False
        self.open_depth = 0
        self._syntax = syntax
        self._events = events
        self._name = NameReader(syntax.name)
        self._next = markers(syntax.key_begin, syntax.end)
        self._key_end = markers(syntax.key_end)
        self._value_begin = markers(syntax.value_begin)
        self._value_end = markers(syntax.value_end)
        self._phase = "name"
        self._num_arguments = 0
        self._key = ""
        self._kinds: frozenset[str] = frozenset()
        self._value_pieces: list[str] = []
        self._is_first_piece = True
        self._held = ""

    def read(self, text: str, position: int, *, is_last: bool) -> int:
        while position < len(text) and self.progress is Progress.READING:
            before, phase = position, self._phase
            if phase == "name":
                position = self._read_name(text, position, is_last=is_last)
            elif phase == "gap":
                position = self._read_gap(text, position, is_last=is_last)
            elif phase == "key":
                position = self._read_key(text, position, is_last=is_last)
            elif phase == "value begin":
                position = self._read_marker(self._value_begin, "value", text, position, is_last=is_last)
            else:
                position = self._read_value(text, position)
            if position == before and self._phase == phase:
                break
        return position

    def _read_name(self, text: str, position: int, *, is_last: bool) -> int:
        name = self._name
        position = name.read(text, position, is_last=is_last)
        if name.is_broken or (name.end and not self._events.may_call(name.name)):
            self.progress = Progress.BROKEN
        elif name.end:
            self._events.start_call(name.name, name.call_id)
            self.has_started = True
            self._phase = "gap"
        return position

    def _read_marker(
        self, expected: Markers, following: str, text: str, position: int, *, is_last: bool
    ) -> int:
        """Blanks, then a marker that must come."""
        position = end_of_blanks(text, position)
        found = expected.at(text, position, is_last=is_last) if position < len(text) else ""
        if found is None:
            self.progress = Progress.BROKEN
        elif found:
            self._phase = following
            position += len(found)
        return position

    def _read_gap(self, text: str, position: int, *, is_last: bool) -> int:
        position = end_of_blanks(text, position)
        found = self._next.at(text, position, is_last=is_last) if position < len(text) else ""
        if found is None:
            self.progress = Progress.BROKEN
        elif found == self._syntax.end:
            self._events.add_arguments("}" if self._num_arguments else "{}")
            self._events.end_call()
            self.progress = Progress.DONE
        elif found:
            position += len(found)
            self._phase = "key"
            self._key = ""
        return position

    def _read_key(self, text: str, position: int, *, is_last: bool) -> int:
        room = MAX_NAME_CHARS - len(self._key)
        # No farther than a key may reach: it would be looked at again.
        window = text[position : position + room + len(self._syntax.key_end)]
        end, found = self._key_end.search(window, 0, is_last=is_last)
        end += position
        if end - position > room:
            self.progress = Progress.BROKEN
            return position + room
        self._key += text[position:end]
        if found:
            self._begin_argument(self._key.strip(" \t\r\n"))
            self._phase = "value begin" if self._syntax.value_begin else "value"
        return end + len(found)

    def _begin_argument(self, key: str) -> None:
        self._kinds = argument_kinds(self._events.schema_of(self._name.name), key)
        opening = ", " if self._num_arguments else "{"
        quote = '"' if is_only_string(self._kinds) else ""
        self._events.add_arguments(f"{opening}{json.dumps(key, ensure_ascii=False)}: {quote}")
        self._num_arguments += 1
        self._value_pieces = []
        self._is_first_piece = True
        self._held = ""

    def _read_value(self, text: str, position: int) -> int:
        # Also at the reply's end: what began like the end of the value was meant so.
        end, found = self._value_end.search(text, position, is_last=False)
        piece = text[position:end]
        if self._syntax.trims_line:
            piece = self._without_line_breaks(piece, is_over=bool(found))
        if is_only_string(self._kinds):
            self._events.add_arguments(json_string_content(piece))
            if found:
                self._events.add_arguments('"')
        else:
            self._value_pieces.append(piece)
            if found:
                value = argument_as_json("".join(self._value_pieces), self._kinds)
                self._events.add_arguments(value)
        if found:
            self._phase = "gap"
        return end + len(found)

    def _without_line_breaks(self, piece: str, *, is_over: bool) -> str:
        """The piece less the line break that opens the value and the one that closes it.

        `_held` is a line break that may be the last.
        """
        if self._is_first_piece and piece:
            self._is_first_piece = False
            piece = piece.removeprefix("\n")
        piece = self._held + piece
        self._held = ""
        if piece.endswith("\n"):
            piece = piece[:-1]
            self._held = "" if is_over else "\n"
        return piece
