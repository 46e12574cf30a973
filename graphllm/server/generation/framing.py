"""From what a step adds to a reply's choices to the frames of its stream, in the order that wires expect.

Owns the order and what a frame carries beside its text. What frames look like is the wire's; where they go is
the reply's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graphllm.server.generation.choices import Piece, PieceKind
from graphllm.server.generation.wire import Choice, ChunkExtras, Usage, Wire


class ReplyFramer:
    """The stream of one reply; `take` empties it. usage: so far, asked when a frame needs it."""

    __slots__ = ("_frames", "_opened", "_usage", "_wire")

    def __init__(self, wire: Wire, usage: Callable[[], Usage]) -> None:
        self._wire = wire
        self._usage = usage
        self._frames: list[bytes] = []
        self._opened: set[int] = set()

    def add(self, choice: Choice, pieces: Sequence[Piece]) -> None:
        """Frames of what is new in a choice; its last ones when it has ended."""
        frames = self._frames
        if not self._opened:
            frames.append(self._wire.begin(self._usage()))
        if choice.index not in self._opened:
            self._opened.add(choice.index)
            frames.append(self._wire.opening(choice))
        for piece in pieces:
            frames.append(self._frame(choice, piece))
        if choice.finish_reason is not None:
            frames.append(self._wire.closing(choice, extras=self._extras(choice)))

    def end(self, choices: Sequence[Choice]) -> None:
        self._frames.append(self._wire.end(choices, self._usage()))

    def take(self) -> bytes:
        """What has been framed since the last call."""
        data = b"".join(self._frames)
        self._frames.clear()
        return data

    def _frame(self, choice: Choice, piece: Piece) -> bytes:
        wire = self._wire
        match piece.kind:
            case PieceKind.TEXT:
                return wire.text(choice, piece.text, extras=self._extras(choice))
            case PieceKind.REASONING:
                return wire.reasoning(choice, piece.text, extras=self._extras(choice))
        call = choice.tool_calls[piece.call_index]
        if piece.kind is PieceKind.CALL_START:
            return wire.tool_call_start(choice, call, extras=self._extras(choice))
        if piece.kind is PieceKind.CALL_ARGUMENTS:
            return wire.tool_call_arguments(choice, call, piece.text, extras=self._extras(choice))
        return wire.tool_call_end(choice, call)

    def _extras(self, choice: Choice) -> ChunkExtras | None:
        """What this frame carries beside its text; a choice's waiting values go with it."""
        wire = self._wire
        if not (wire.wants_logprobs or wire.wants_token_ids or wire.wants_running_usage):
            return None
        logprobs = token_ids = usage = None
        if wire.wants_logprobs:
            logprobs, choice.logprobs = choice.logprobs, []
        if wire.wants_token_ids:
            token_ids, choice.token_ids = choice.token_ids, []
        if wire.wants_running_usage:
            usage = self._usage()
        return ChunkExtras(logprobs, token_ids, usage)
