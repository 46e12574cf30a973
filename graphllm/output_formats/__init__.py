"""Reading what models write: tool calls and reasoning sections, in the formats of the model families.

Owns the descriptions of the formats and the one parser and grammar writer that read them. Knows text only:
which tokens make it up, and what becomes of what was read, is known elsewhere.
"""

from graphllm.output_formats.events import (
    OutputEvent,
    OutputParser,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from graphllm.output_formats.output_format import OutputFormat
from graphllm.output_formats.registry import (
    FORMAT_NAMES,
    REASONING_NAMES,
    find_format,
    guess_format,
    with_reasoning,
)

__all__ = [
    "FORMAT_NAMES",
    "REASONING_NAMES",
    "OutputEvent",
    "OutputFormat",
    "OutputParser",
    "ReasoningDelta",
    "TextDelta",
    "ToolCallArguments",
    "ToolCallEnd",
    "ToolCallStart",
    "find_format",
    "guess_format",
    "with_reasoning",
]
