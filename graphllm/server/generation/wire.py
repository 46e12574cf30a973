"""The bytes of answers, as far as dialects are alike: what a wire is asked for, and what it is told.

A dialect's wire knows JSON and the shapes of its API, nothing of connections or of the engine. Frames are
whole server-sent events, ready for the socket; a frame may be empty where a dialect says nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from graphllm import __version__
from graphllm.errors import GraphLLMError
from graphllm.outputs import FinishReason, TokenLogprob
from graphllm.server import sse

# Names the backend as far as it matters for repeating a seeded request.
SYSTEM_FINGERPRINT = f"graphllm-{__version__}"


@dataclass(slots=True)
class ToolCall:
    """One call of a choice, as far as it has come. index: its place among the choice's calls, from 0."""

    index: int
    call_id: str
    name: str
    arguments: list[str] = field(default_factory=list)

    @property
    def arguments_json(self) -> str:
        return "".join(self.arguments)


@dataclass(slots=True)
class Choice:
    """One choice of an answer, as far as it has come.

    Streams keep no text unless their wire asks for it (`Wire.keeps_text`), so a long stream takes no memory.
    token_ids: every sampled token, the stop token included. prompt_logprobs: an entry for each prompt token,
    None for the first.
    """

    index: int
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def called_tools(self) -> bool:
        return bool(self.tool_calls)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What an answer took; `cached_tokens` of the prompt tokens were not computed.

    reasoning_tokens: those of the completion tokens that were reasoning, counted by the step they came in.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    def as_json(self) -> dict[str, Any]:
        """OpenAI's object, as chat and text completions have it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


@dataclass(frozen=True, slots=True)
class ChunkExtras:
    """What a frame carries beside its text; each None unless it was asked for.

    logprobs and token_ids: of the tokens since the last frame of this choice. usage: so far.
    """

    logprobs: list[TokenLogprob] | None = None
    token_ids: list[int] | None = None
    usage: Usage | None = None


class Wire(ABC):
    """One reply in a dialect's shapes.

    Frames come in this order: `begin`, then for each choice `opening`, any of `text`, `reasoning` and the
    three of tool calls, `closing`; at last `end`, or `failure`. `extras` is None where there are none, so
    that the usual token costs a template and a string.
    """

    # Whether streams keep their text, for wires whose last frames repeat the whole answer.
    keeps_text = False
    # What a reply collects for this wire.
    wants_logprobs = False
    wants_token_ids = False
    wants_running_usage = False

    def __init__(self, reply_id: str) -> None:
        self.reply_id = reply_id

    def new_call_id(self) -> str | None:
        """The id of a tool call for which the model wrote none."""
        return None

    def begin(self, usage: Usage) -> bytes:
        """What comes before the first choice; `usage` knows the prompt only."""
        return b""

    @abstractmethod
    def opening(self, choice: Choice) -> bytes:
        """What comes before the first text of a choice. Its prompt_logprobs, if any, are known."""

    @abstractmethod
    def text(self, choice: Choice, text: str, *, extras: ChunkExtras | None) -> bytes: ...

    @abstractmethod
    def reasoning(self, choice: Choice, text: str, *, extras: ChunkExtras | None) -> bytes: ...

    @abstractmethod
    def tool_call_start(self, choice: Choice, call: ToolCall, *, extras: ChunkExtras | None) -> bytes: ...

    @abstractmethod
    def tool_call_arguments(
        self, choice: Choice, call: ToolCall, text: str, *, extras: ChunkExtras | None
    ) -> bytes: ...

    def tool_call_end(self, choice: Choice, call: ToolCall) -> bytes:
        """No more arguments will come."""
        return b""

    @abstractmethod
    def closing(self, choice: Choice, *, extras: ChunkExtras | None) -> bytes:
        """The last frame of a choice; its finish_reason is known."""

    @abstractmethod
    def end(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """What comes behind the last choice."""

    def failure(self, error: GraphLLMError) -> bytes:
        """What ends a stream that had begun when its request died."""
        return sse.frame(orjson.dumps(error.body()))

    def preparation(self, choices: Sequence[Choice]) -> Iterator[None]:
        """What `whole` needs and takes long to make, in pieces of well below a millisecond."""
        return iter(())

    @abstractmethod
    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """The body of an answer that is not streamed."""
