"""Reading one tool call: the part that all ways of writing calls share, and calls that are JSON objects.

Owns the contract of the readers. Other ways of writing calls have files of their own; what stands around
calls is `envelope_reader.py`'s. Double-encoded arguments (a JSON string that holds an object) are
unwrapped, and null or none at all are `{}`: models trained on records of the OpenAI API write both.
"""

from __future__ import annotations

import json
from enum import Enum, auto
from typing import Protocol

from graphllm.output_formats.json_scanner import JsonScanner
from graphllm.output_formats.markers import end_of_blanks
from graphllm.output_formats.output import EventList
from graphllm.output_formats.syntax import JsonCall

MAX_NAME_CHARS = 256
"""Most characters of a tool's name, a key or an id as written; more is no call."""

_KNOWN_KEYS = frozenset({"type", "id", "call_id", "tool_call_id", "index"})
_ID_KEYS = frozenset({"id", "call_id", "tool_call_id"})


class Progress(Enum):
    READING = auto()
    DONE = auto()
    BROKEN = auto()
    """What comes next is no part of a call. Where the call has started, it ends here."""


class CallReader(Protocol):
    """Reads one call from its first character on, and says so to an EventList.

    `has_started`: the call was announced; until then its text may still turn out to be no call. Broken
    readers stop before the character that broke them. `open_depth` then says how many JSON objects lie open
    around it that are whole so far, but no call; 0 where that does not matter.
    """

    progress: Progress
    has_started: bool
    open_depth: int

    def read(self, text: str, position: int, *, is_last: bool) -> int:
        """Reads on; gives the place behind what was read. What is left waits for more text."""
        ...


class ArgumentsReader:
    """Reads the JSON value that stands for a call's arguments."""

    __slots__ = ("_encoded", "_scanner", "is_broken", "is_certain", "is_done")

    def __init__(self) -> None:
        self.is_done = False
        self.is_broken = False
        self.is_certain = False
        """Whether they are an object: known from its first character, or at the end."""
        self._encoded: list[str] | None = None
        self._scanner: JsonScanner | None = None

    @property
    def has_begun(self) -> bool:
        """Whether the value's first character was read."""
        return self._scanner is not None

    def read(self, text: str, position: int, out: list[str]) -> int:
        """Reads on from a character; appends the object's text to `out` as it comes."""
        if self._scanner is None:
            if text[position] not in '{"n':
                self.is_broken = True
                return position
            self.is_certain = text[position] == "{"
            self._encoded = None if self.is_certain else []
            self._scanner = JsonScanner()
        position = self._scanner.read(text, position, out if self._encoded is None else self._encoded)
        self.is_broken = self._scanner.is_broken
        self.is_done = self._scanner.is_done
        if self.is_done and self._encoded is not None:
            unwrapped = unwrapped_object("".join(self._encoded))
            self.is_certain = unwrapped is not None
            self.is_broken = unwrapped is None
            out.append(unwrapped or "")
        return position


def unwrapped_object(literal: str) -> str | None:
    """The JSON object that a JSON string holds; `{}` for null and the empty string; None for others."""
    text = json.loads(literal) or ""
    text = text.strip(" \t\r\n") or "{}"
    pieces: list[str] = []
    scanner = JsonScanner()
    end = scanner.read(text, 0, pieces)
    if not text.startswith("{") or not scanner.is_done or end != len(text):
        return None
    return "".join(pieces) if is_encodable(text) else None


def is_encodable(text: str) -> bool:
    """Whether `text` has no lone surrogates, which JSON's escapes can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class JsonCallReader:
    """Reads `{"name": ..., "arguments": {...}}`. Arguments that come before the name wait for it."""

    __slots__ = (
        "_arguments",
        "_call_id",
        "_captured",
        "_depth",
        "_events",
        "_key",
        "_name",
        "_out",
        "_phase",
        "_purpose",
        "_scanner",
        "_syntax",
        "has_started",
        "open_depth",
        "progress",
    )

    def __init__(self, syntax: JsonCall, events: EventList) -> None:
        self.progress = Progress.READING
        self.has_started = False
        self.open_depth = 0
        self._syntax = syntax
        self._events = events
        self._phase = "open"
        self._depth = 0
        self._key = ""
        self._purpose = ""
        self._name: str | None = None
        self._call_id: str | None = None
        self._arguments: ArgumentsReader | None = None
        self._out: list[str] = []
        self._scanner: JsonScanner | None = None
        self._captured: list[str] = []

    def read(self, text: str, position: int, *, is_last: bool) -> int:
        while position < len(text) and self.progress is Progress.READING:
            if self._phase == "scalar":
                position = self._read_scalar(text, position)
            elif self._phase == "arguments":
                position = self._read_arguments(text, position)
            else:
                position = end_of_blanks(text, position)
                if position < len(text):
                    position += self._takes(text[position])
        return position

    def _break(self, *, is_whole_so_far: bool = False) -> bool:
        self.progress = Progress.BROKEN
        # A marked call's text is looked through for other calls; an object in plain text is passed over.
        if is_whole_so_far and not self._syntax.ignores_other_keys:
            self.open_depth = self._depth
        return False

    def _takes(self, char: str) -> bool:
        """One character between values; false where it is left to what comes next."""
        phase = self._phase
        if phase in ("open", "nested") and char == "{":
            self._depth += 1
            self._phase = "first key"
        elif phase in ("first key", "key") and char == '"':
            self._begin_scalar("key")
            return False
        elif phase == "colon" and char == ":":
            self._phase = "value"
        elif phase == "value":
            return self._begins_value(char)
        elif phase == "after" and char == ",":
            self._phase = "key"
        elif phase in ("after", "first key") and char == "}":
            return self._closes()
        else:
            return self._break()
        return True

    def _begin_scalar(self, purpose: str) -> None:
        self._purpose = purpose
        self._phase = "scalar"
        self._scanner = JsonScanner(is_strict=True)
        self._captured = []

    def _begins_value(self, char: str) -> bool:
        key = self._key
        if key in self._syntax.name_keys and self._name is None:
            if char == "{" and self._depth == 1:
                self._phase = "nested"
                return self._takes(char)
            if char != '"':
                return self._break(is_whole_so_far=True)
            self._begin_scalar("name")
        elif key in self._syntax.arguments_keys and self._arguments is None:
            self._arguments = ArgumentsReader()
            self._phase = "arguments"
        elif key in _KNOWN_KEYS or self._syntax.ignores_other_keys or self.has_started:
            self._begin_scalar("id" if key in _ID_KEYS and char == '"' else "other")
        else:
            return self._break(is_whole_so_far=True)
        return False

    def _read_scalar(self, text: str, position: int) -> int:
        """A key, name or id, which is kept, or any other value, which is not."""
        scanner = self._scanner
        assert scanner is not None
        if self._purpose == "other":
            position = scanner.read(text, position, [])
        else:
            room = MAX_NAME_CHARS - sum(map(len, self._captured))
            position += scanner.read(text[position : position + room], 0, self._captured)
            self._captured = ["".join(self._captured)]
            if len(self._captured[0]) == MAX_NAME_CHARS and not scanner.is_done:
                self._break()
                return position
        if scanner.is_broken:
            self._break()
        elif scanner.is_done:
            self._phase = "after"
            if self._purpose != "other":
                self._keep(json.loads(self._captured[0]))
        return position

    def _keep(self, text: str) -> None:
        if self._purpose == "key":
            self._key = text
            self._phase = "colon"
        elif self._purpose == "id":
            self._call_id = text if text and is_encodable(text) else None
        elif not self._events.may_call(text) or not is_encodable(text):
            self._break(is_whole_so_far=True)
        else:
            self._name = text
            if self._arguments is not None:
                self._give()

    def _read_arguments(self, text: str, position: int) -> int:
        arguments = self._arguments
        assert arguments is not None
        position = arguments.read(text, position, self._out)
        if self._name is not None and arguments.is_certain:
            self._give()
        if arguments.is_broken:
            self._break()
        elif arguments.is_done:
            self._phase = "after"
        return position

    def _give(self) -> None:
        """Announces the call if it was not, and gives the arguments that came."""
        assert self._name is not None
        if not self.has_started:
            self._events.start_call(self._name, self._call_id)
            self.has_started = True
        self._events.add_arguments("".join(self._out))
        self._out = []

    def _closes(self) -> bool:
        if self._depth == 2:
            self._depth = 1
            self._phase = "after"
            return True
        if self._name is None:
            return self._break(is_whole_so_far=True)
        if self._arguments is None:
            if not self._syntax.ignores_other_keys and not self._events.knows_tools:
                return self._break(is_whole_so_far=True)
            self._out.append("{}")
        self._give()
        self._events.end_call()
        self.progress = Progress.DONE
        return True
