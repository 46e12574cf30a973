"""What a parser of a model's text says: pieces of answer, of reasoning and of tool calls.

Owns the values and the Protocol between whoever detokenizes and whoever writes a reply. Knows no format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the answer; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """A piece of the reasoning before or between answers; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins. `index` counts from 0 in a reply; `call_id` is one that the model wrote, if it did."""

    index: int
    name: str
    call_id: str | None


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A piece of the JSON text of a call's arguments; never empty. Joined, they are the arguments."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """A call has ended. Its arguments are whole JSON, unless the model was cut off or wrote none."""

    index: int


OutputEvent = TextDelta | ReasoningDelta | ToolCallStart | ToolCallArguments | ToolCallEnd


class OutputParser(Protocol):
    """Reads one reply as it comes. Whatever the text, neither method raises."""

    def append(self, text: str) -> list[OutputEvent]:
        """What `text`, the next piece of any length, says; what may yet begin a marker waits."""
        ...

    def finish(self) -> list[OutputEvent]:
        """What was held back, once the reply has ended. Called once, last."""
        ...
