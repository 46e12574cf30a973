"""The events of a piece of text while they are made: neighbours joined, calls counted.

Owns the list of events and the number of calls. Which text is what is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping

from graphllm.output_formats.events import (
    OutputEvent,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)

Tools = Mapping[str, Mapping[str, object] | None]
"""The tools that may be called: name to the JSON schema of the arguments, None for any object."""


class EventList:
    """Collects events. Pieces of one kind that follow each other become one event."""

    __slots__ = ("_events", "_kind", "_pieces", "_tools", "num_calls")

    def __init__(self, tools: Tools | None) -> None:
        """tools: None where any name may be called."""
        self.num_calls = 0
        self._tools = tools
        self._events: list[OutputEvent] = []
        self._pieces: list[str] = []
        self._kind = ""

    @property
    def knows_tools(self) -> bool:
        """Whether the tools are known; otherwise every name may be one."""
        return self._tools is not None

    def may_call(self, name: str) -> bool:
        """Whether there is such a tool."""
        return bool(name) and (self._tools is None or name in self._tools)

    def schema_of(self, name: str) -> Mapping[str, object] | None:
        """The schema of a tool's arguments, None where there is none."""
        return None if self._tools is None else self._tools.get(name)

    def add_text(self, text: str) -> None:
        self._add("text", text)

    def add_reasoning(self, text: str) -> None:
        self._add("reasoning", text)

    def start_call(self, name: str, call_id: str | None) -> None:
        """The next call begins; pieces of arguments belong to it until it ends."""
        self._join()
        self._events.append(ToolCallStart(self.num_calls, name, call_id))
        self.num_calls += 1

    def add_arguments(self, text: str) -> None:
        self._add("arguments", text)

    def end_call(self) -> None:
        """The call begun last has ended."""
        self._join()
        self._events.append(ToolCallEnd(self.num_calls - 1))

    def take(self) -> list[OutputEvent]:
        """The events since the last time."""
        self._join()
        events, self._events = self._events, []
        return events

    def _add(self, kind: str, text: str) -> None:
        if text:
            if kind != self._kind:
                self._join()
                self._kind = kind
            self._pieces.append(text)

    def _join(self) -> None:
        if self._pieces:
            text = "".join(self._pieces)
            self._pieces = []
            if self._kind == "text":
                self._events.append(TextDelta(text))
            elif self._kind == "reasoning":
                self._events.append(ReasoningDelta(text))
            else:
                self._events.append(ToolCallArguments(self.num_calls - 1, text))
        self._kind = ""
