"""From one sequence's deltas to what its choice says: text, reasoning, tool calls.

Owns the choice while it grows and the counts behind `usage`. How a model writes calls and reasoning is
`output_formats`'; how an answer is written is the wire's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from uuid import uuid4

from graphllm.output_formats.events import (
    OutputEvent,
    OutputParser,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallStart,
)
from graphllm.outputs import SequenceDelta
from graphllm.server.generation.request import GenerationRequest, ReasoningOutput
from graphllm.server.generation.wire import Choice, ToolCall


class PieceKind(Enum):
    TEXT = auto()
    REASONING = auto()
    CALL_START = auto()
    CALL_ARGUMENTS = auto()
    CALL_END = auto()


@dataclass(frozen=True, slots=True)
class Piece:
    """What a delta adds to a choice. call_index: which of its calls, for the last three kinds."""

    kind: PieceKind
    text: str = ""
    call_index: int = -1


class ChoiceReader:
    """Reads one sequence of a generation.

    keeps_text: for answers that are sent, or repeated, whole.
    num_tokens counts the choice's tokens, num_reasoning_tokens those that came while it reasoned.
    """

    __slots__ = (
        "_held_reasoning",
        "_is_reasoning",
        "_keeps_text",
        "_keeps_token_ids",
        "_max_calls",
        "_new_call_id",
        "_parser",
        "_reasoning_output",
        "choice",
        "num_reasoning_tokens",
        "num_tokens",
    )

    def __init__(
        self,
        choice: Choice,
        generation: GenerationRequest,
        *,
        new_call_id: Callable[[], str | None],
        keeps_text: bool,
        keeps_token_ids: bool,
    ) -> None:
        self.choice = choice
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        new_parser = generation.new_parser
        self._parser: OutputParser | None = None if new_parser is None else new_parser()
        self._reasoning_output = generation.reasoning_output
        self._held_reasoning: list[str] = []
        self._max_calls = generation.max_tool_calls
        self._new_call_id = new_call_id
        self._keeps_text = keeps_text
        self._keeps_token_ids = keeps_token_ids
        self._is_reasoning = False

    def read(self, delta: SequenceDelta) -> list[Piece]:
        """Take a delta; returns what is new, in order. The choice's end is noted in the choice."""
        choice = self.choice
        self.num_tokens += len(delta.token_ids)
        if delta.logprobs is not None:
            choice.logprobs.extend(delta.logprobs)
        if self._keeps_token_ids:
            choice.token_ids.extend(delta.token_ids)
        if delta.finish_reason is not None:
            choice.finish_reason = delta.finish_reason
            choice.stop_reason = delta.stop_reason
        if self._parser is None:
            if not delta.text:
                return []
            if self._keeps_text:
                choice.text.append(delta.text)
            return [Piece(PieceKind.TEXT, delta.text)]
        events = self._parser.append(delta.text) if delta.text else []
        if delta.finish_reason is not None:
            events = [*events, *self._parser.finish()]
        pieces: list[Piece] = []
        for event in events:
            self._is_reasoning = isinstance(event, ReasoningDelta)
            if isinstance(event, ReasoningDelta):
                pieces += self._reasoning(event.text)
                continue
            pieces += self._released_reasoning()
            if not self._is_surplus(event):
                pieces.append(self._piece(event))
        if self._is_reasoning:
            self.num_reasoning_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            pieces += self._released_reasoning()
        return pieces

    def _reasoning(self, text: str) -> list[Piece]:
        if self._reasoning_output is ReasoningOutput.HIDE:
            return []
        if self._keeps_text:
            self.choice.reasoning.append(text)
        if self._reasoning_output is ReasoningOutput.WHOLE:
            self._held_reasoning.append(text)
            return []
        return [Piece(PieceKind.REASONING, text)]

    def _released_reasoning(self) -> list[Piece]:
        """What was held back to be sent in one piece."""
        if not self._held_reasoning:
            return []
        text = "".join(self._held_reasoning)
        self._held_reasoning.clear()
        return [Piece(PieceKind.REASONING, text)]

    def _is_surplus(self, event: OutputEvent) -> bool:
        """Whether an event belongs to a call beyond those that were asked for."""
        if self._max_calls is None or isinstance(event, TextDelta | ReasoningDelta):
            return False
        return event.index >= self._max_calls

    def _piece(self, event: OutputEvent) -> Piece:
        choice = self.choice
        assert not isinstance(event, ReasoningDelta)
        if isinstance(event, TextDelta):
            if self._keeps_text:
                choice.text.append(event.text)
            return Piece(PieceKind.TEXT, event.text)
        if isinstance(event, ToolCallStart):
            call_id = event.call_id or self._new_call_id() or f"call_{uuid4().hex[:24]}"
            choice.tool_calls.append(ToolCall(event.index, call_id, event.name))
            return Piece(PieceKind.CALL_START, call_index=event.index)
        if isinstance(event, ToolCallArguments):
            if self._keeps_text:
                choice.tool_calls[event.index].arguments.append(event.text)
            return Piece(PieceKind.CALL_ARGUMENTS, event.text, event.index)
        return Piece(PieceKind.CALL_END, call_index=event.index)
