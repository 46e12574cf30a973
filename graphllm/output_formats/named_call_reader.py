"""Reading a call's name in plain text, and calls that are such a name followed by a JSON object.

Owns the text that may stand around a name: leads, ids, numbers. What comes behind it in other ways of
writing calls is their readers'.
"""

from __future__ import annotations

import re

from graphllm.output_formats.call_readers import MAX_NAME_CHARS, ArgumentsReader, Progress
from graphllm.output_formats.markers import end_of_blanks, markers
from graphllm.output_formats.output import EventList
from graphllm.output_formats.syntax import NamedJsonCall, NameText

_NAME_RUN = re.compile(r"[^\s<>\[\](){}\"'`|,;=]*")


class NameReader:
    """Reads a call's name in plain text, and the marker behind it."""

    __slots__ = ("_ends", "_has_begun", "_in_gap", "_raw", "_syntax", "call_id", "end", "is_broken", "name")

    def __init__(self, syntax: NameText) -> None:
        self.name = ""
        self.call_id: str | None = None
        self.end = ""
        """The marker that ended the name; "" as long as none has."""
        self.is_broken = False
        self._syntax = syntax
        marks = (syntax.id_mark,) if syntax.id_mark else ()
        self._ends = markers(*syntax.ends, *syntax.stops, *marks)
        self._raw = ""
        self._has_begun = False
        self._in_gap = False

    def read(self, text: str, position: int, *, is_last: bool) -> int:
        """Reads on until the name has ended; markers among `stops` are left where they are."""
        if not self._has_begun:
            position = end_of_blanks(text, position)
            if position == len(text):
                return position
            lead = markers(*self._syntax.leads).at(text, position, is_last=is_last)
            if lead == "":
                return position
            self._has_begun = True
            if lead is not None:
                position += len(lead)
                self._raw = lead
        while position < len(text) and not self.is_broken and not self.end:
            if not self._in_gap:
                position = self._read_run(text, position)
                continue
            end = self._ends.at(text, position, is_last=is_last)
            if end == "":
                break
            if end is not None:
                position += 0 if end in self._syntax.stops else len(end)
                self._finish(end)
            elif text[position] in " \t\r\n":
                position += 1
            else:
                self.is_broken = True
        return position

    def _read_run(self, text: str, position: int) -> int:
        # One more character than there may be shows that there are too many.
        end = position + MAX_NAME_CHARS + 1 - len(self.name)
        found = _NAME_RUN.match(text, position, end)
        assert found is not None
        self.name += found.group()
        self.is_broken = len(self.name) > MAX_NAME_CHARS
        self._in_gap = found.end() < len(text)
        return found.end()

    def _finish(self, end: str) -> None:
        if self._syntax.is_call_id:
            self.call_id = self._raw + self.name
        name, mark, number = self.name.rpartition(self._syntax.number_mark or ":")
        if self._syntax.number_mark and mark and number.isdecimal():
            self.name = name
        self.end = end
        self.is_broken = not self.name


class NamedJsonCallReader:
    """Reads a name and the JSON object behind it."""

    __slots__ = (
        "_arguments",
        "_events",
        "_id",
        "_name",
        "_out",
        "_syntax",
        "has_started",
        "open_depth",
        "progress",
    )

    def __init__(self, syntax: NamedJsonCall, events: EventList, *, name: str | None = None) -> None:
        """name: the call's name where it was read already; only the arguments come."""
        self.progress = Progress.READING
        self.has_started = False
        self.open_depth = 0
        self._events = events
        self._syntax = syntax
        self._name = NameReader(syntax.name)
        self._id: NameReader | None = None
        self._arguments: ArgumentsReader | None = None
        self._out: list[str] = []
        if name is not None:
            self._name.name, self._name.end = name, syntax.name.ends[0]
            self._arguments = ArgumentsReader()

    def read(self, text: str, position: int, *, is_last: bool) -> int:
        if not self._name.end:
            position = self._read_name(text, position, is_last=is_last)
        if self._id is not None and not self._id.end and not self._id.is_broken:
            position = self._id.read(text, position, is_last=is_last)
            if self._id.is_broken:
                self.progress = Progress.BROKEN
        if self._arguments is not None and self.progress is Progress.READING:
            if self._id is not None and not self._id.end:
                return position
            if not self._arguments.has_begun:
                position = end_of_blanks(text, position)
            if position < len(text):
                position = self._read_arguments(self._arguments, text, position)
        return position

    def _read_name(self, text: str, position: int, *, is_last: bool) -> int:
        name = self._name
        position = name.read(text, position, is_last=is_last)
        if name.is_broken or (name.end and not self._events.may_call(name.name)):
            self.progress = Progress.BROKEN
        elif name.end:
            self._arguments = ArgumentsReader()
            if name.end == self._syntax.name.id_mark:
                self._id = NameReader(NameText(ends=self._syntax.name.ends, stops=self._syntax.name.stops))
        return position

    def _read_arguments(self, arguments: ArgumentsReader, text: str, position: int) -> int:
        if not arguments.has_begun and text[position] == "<":
            # The marker that ends the call: there are no arguments.
            arguments.is_certain = arguments.is_done = True
            self._out.append("{}")
        else:
            position = arguments.read(text, position, self._out)
        if arguments.is_certain:
            if not self.has_started:
                call_id = self._name.call_id if self._id is None else self._id.name
                self._events.start_call(self._name.name, call_id)
                self.has_started = True
            self._events.add_arguments("".join(self._out))
            self._out = []
        if arguments.is_broken:
            self.progress = Progress.BROKEN
        elif arguments.is_done:
            self._events.end_call()
            self.progress = Progress.DONE
        return position
