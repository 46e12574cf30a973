"""The one kind of request behind every endpoint that generates text.

Values only: what a dialect's body means, without its names. Making it of a chat is `chat.py`'s, of plain
prompts `prompts.py`'s; answering it is `replies.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from graphllm.output_formats.events import OutputParser
from graphllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class RequestWarning:
    """A field that was accepted and not honoured. `as_json` is its entry in an answer's `warnings`."""

    field: str
    message: str

    def as_json(self) -> dict[str, str]:
        return {"field": self.field, "message": self.message}


class ReasoningOutput(Enum):
    """STREAM: as it comes. WHOLE: in one piece, when it has ended. HIDE: not at all."""

    STREAM = auto()
    WHOLE = auto()
    HIDE = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """Prompts to continue with one set of parameters, and how what comes is read.

    prompts: token ids, each an engine request of `params.n` sequences; choice `i * n + j` is the j-th of
    prompt i. lora: the adapter's name, None for the base model. new_parser: makes, for each choice, the
    reader of its text that finds reasoning and tool calls; None where text is text. reasoning_output: what
    becomes of the reasoning that it finds. max_tool_calls: how many of the calls that it finds are calls;
    later ones are dropped. priority: lower runs earlier. structure_name: the client's name of the field that
    became `params.structured_outputs`, for errors that are found after the request was admitted.
    """

    prompts: list[list[int]]
    params: SamplingParams
    new_parser: Callable[[], OutputParser] | None = None
    reasoning_output: ReasoningOutput = ReasoningOutput.STREAM
    max_tool_calls: int | None = None
    cache_salt: str | None = None
    priority: int = 0
    lora: str | None = None
    structure_name: str = "structured_outputs"
