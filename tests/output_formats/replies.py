"""What a reply says when it is read in pieces: helpers of the tests of output formats."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from graphllm.output_formats import (
    OutputEvent,
    OutputFormat,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    find_format,
)

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "metric": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "where": {"type": "object"},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["city"],
}
TOOLS = {"get_weather": WEATHER, "get_time": {"type": "object", "properties": {}}, "run.code": None}


@dataclass
class Call:
    """One call as a client puts it together. `pieces` are its arguments as they came."""

    name: str
    call_id: str | None = None
    pieces: list[str] = field(default_factory=list)
    has_ended: bool = False

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def arguments(self) -> object:
        return json.loads(self.text)


@dataclass
class Reply:
    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    @property
    def called(self) -> list[tuple[str, object]]:
        return [(call.name, call.arguments) for call in self.calls]


def events_of(
    output_format: OutputFormat | str,
    pieces: Iterable[str],
    *,
    tools: dict[str, dict[str, object] | None] | None = TOOLS,
    parses_tools: bool = True,
    parses_reasoning: bool = True,
    starts_in_reasoning: bool = False,
) -> list[OutputEvent]:
    if isinstance(output_format, str):
        output_format = find_format(output_format)
    parser = output_format.parser(
        parses_tools=parses_tools,
        tools=tools,
        parses_reasoning=parses_reasoning,
        starts_in_reasoning=starts_in_reasoning,
    )
    found = [event for piece in pieces for event in parser.append(piece)]
    return found + parser.finish()


def joined(events: Sequence[OutputEvent]) -> list[OutputEvent]:
    """Neighbours of one kind as one: what must not depend on the pieces that a text comes in."""
    result: list[OutputEvent] = []
    for event in events:
        last = result[-1] if result else None
        has_text = isinstance(event, TextDelta | ReasoningDelta | ToolCallArguments)
        if has_text and type(last) is type(event):
            assert isinstance(last, TextDelta | ReasoningDelta | ToolCallArguments)
            result[-1] = replace(last, text=last.text + event.text)
        else:
            result.append(event)
    return result


def reply_of(events: Sequence[OutputEvent]) -> Reply:
    """Puts a reply together, and checks that its events come in an order that clients can follow."""
    reply = Reply()
    for event in events:
        is_open = bool(reply.calls) and not reply.calls[-1].has_ended
        match event:
            case TextDelta(text):
                assert text and not is_open
                reply.text += text
            case ReasoningDelta(text):
                assert text and not is_open
                reply.reasoning += text
            case ToolCallStart(index, name, call_id):
                assert index == len(reply.calls) and not is_open
                reply.calls.append(Call(name, call_id))
            case ToolCallArguments(index, text):
                assert text and is_open and index == len(reply.calls) - 1
                reply.calls[-1].pieces.append(text)
            case ToolCallEnd(index):
                assert is_open and index == len(reply.calls) - 1
                reply.calls[-1].has_ended = True
    assert all(call.has_ended for call in reply.calls)
    return reply


def read(output_format: OutputFormat | str, text: str, **options: object) -> Reply:
    """The reply that `text` is, read whole and character by character: both must say the same."""
    whole = joined(events_of(output_format, [text], **options))  # type: ignore[arg-type]
    assert joined(events_of(output_format, text, **options)) == whole  # type: ignore[arg-type]
    return reply_of(whole)
