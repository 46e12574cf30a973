"""The bodies of /v1/messages and /v1/messages/count_tokens as this server honours them, and what they mean.

Owns the fields, their types and their translation into sampling parameters and tools. Messages and their
blocks are `messages.py`'s; fields that are known and not honoured are in `known_fields.py`.

Marks for a prompt cache (`cache_control`) are accepted everywhere and change nothing: prefixes are cached
automatically, whatever is marked.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from graphllm.errors import InvalidRequestError, UnsupportedFieldError
from graphllm.sampling_params import SamplingParams
from graphllm.server.generation.chat import FunctionTool, ToolChoice, ToolMode
from graphllm.server.generation.decoding import NestedReader
from graphllm.server.generation.request import RequestWarning
from graphllm.server.generation.served_model import ModelBody
from graphllm.server.generation.tools import distinct_tools
from graphllm.structured_outputs import StructuredOutputs

# Anthropic's least budget for thinking.
MIN_BUDGET_TOKENS = 1024


class CacheControl(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Thinking(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, forbid_unknown_fields=True):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class ToolChoiceBody(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Metadata(msgspec.Struct, forbid_unknown_fields=True):
    user_id: str | None = None


class ToolBody(msgspec.Struct, forbid_unknown_fields=True):
    """A tool that the client runs. Its input is streamed as it comes, eager or not."""

    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: str | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None
    input_examples: list[dict[str, Any]] | None = None
    allowed_callers: list[str] | None = None
    defer_loading: bool | None = None


class CountTokensRequest(ModelBody, kw_only=True):
    """The body of POST /v1/messages/count_tokens; null means the default."""

    messages: Annotated[list[dict[str, Any]], Meta(description="The conversation so far.")]
    system: Annotated[
        str | list[dict[str, Any]] | None, Meta(description="What comes before it: a text, or text blocks.")
    ] = None
    tools: Annotated[list[dict[str, Any]] | None, Meta(description="Tools that the client runs.")] = None
    tool_choice: Annotated[ToolChoiceBody | None, Meta(description="auto, any, one tool, or none.")] = None
    thinking: Annotated[Thinking | None, Meta(description="Whether the model reasons first.")] = None
    output_config: Annotated[OutputConfig | None, Meta(description="Effort, and a JSON schema.")] = None
    output_format: Annotated[
        OutputFormat | None, Meta(description="The older name of output_config.format.")
    ] = None
    cache_control: Annotated[
        CacheControl | None, Meta(description="Accepted: prefixes are cached automatically.")
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, Meta(description="Further names for the chat template.")
    ] = None

    @property
    def hides_thinking(self) -> bool:
        return self.thinking is not None and self.thinking.display == "omitted"

    @property
    def allows_parallel_calls(self) -> bool:
        return self.tool_choice is None or not self.tool_choice.disable_parallel_tool_use

    @property
    def reasoning_effort(self) -> str | None:
        """In the words of the shared code; templates that only know on and off take any but none for on."""
        if self.thinking is not None and self.thinking.type == "disabled":
            return "none"
        effort = self.output_config.effort if self.output_config is not None else None
        return effort or ("medium" if self.thinking is not None else None)

    @property
    def client_names(self) -> dict[str, str]:
        """From the names of the shared code to those that this request used."""
        effort = "output_config.effort" if self.thinking is None else "thinking"
        # Without a schema of its own, what was compiled is that of the tools.
        schema = "tools"
        if self.output_format is not None:
            schema = "output_format.schema"
        elif self.output_config is not None and self.output_config.format is not None:
            schema = "output_config.format.schema"
        return {
            "prompt": "messages",
            "stop": "stop_sequences",
            "structured_outputs": schema,
            "reasoning_effort": effort,
        }

    def structured_outputs(self) -> StructuredOutputs | None:
        """Raises InvalidRequestError naming the field."""
        in_config = self.output_config.format if self.output_config is not None else None
        if in_config is not None and self.output_format is not None:
            raise InvalidRequestError(
                "'output_format' is the older name of 'output_config.format'; give one of them.",
                param="output_format",
            )
        chosen = in_config or self.output_format
        if chosen is None:
            return None
        schema: Any = chosen.schema
        return StructuredOutputs(json=schema)

    def function_tools(self, reader: NestedReader) -> tuple[FunctionTool, ...]:
        """Raises InvalidRequestError or UnsupportedFieldError naming `tools[i]`."""
        return distinct_tools(self.tools or (), partial(_function_tool, reader=reader))

    def chosen_tools(self, tools: tuple[FunctionTool, ...]) -> ToolChoice:
        """Raises InvalidRequestError naming `tool_choice`."""
        choice = self.tool_choice
        if choice is None:
            return ToolChoice()
        if choice.name is not None and choice.type != "tool":
            raise InvalidRequestError(
                "'tool_choice.name' is only allowed with type tool.", param="tool_choice.name"
            )
        match choice.type:
            case "auto":
                return ToolChoice()
            case "none":
                return ToolChoice(mode=ToolMode.NONE)
            case "any":
                return ToolChoice(mode=ToolMode.REQUIRED)
            case "tool":
                if choice.name is None:
                    raise InvalidRequestError(
                        "Missing required field: 'tool_choice.name'.", param="tool_choice.name"
                    )
                if choice.name not in {tool.name for tool in tools}:
                    raise InvalidRequestError(
                        f"'tool_choice.name': {choice.name[:80]!r} is not among the tools.",
                        param="tool_choice.name",
                    )
                return ToolChoice(mode=ToolMode.REQUIRED, allowed_names=(choice.name,))

    def own_warnings(self) -> list[RequestWarning]:
        """Values of honoured fields that cannot be honoured."""
        warnings = []
        thinking = self.thinking
        if thinking is not None and thinking.budget_tokens is not None:
            note = "thinking is bounded by max_tokens only, together with the answer."
            warnings.append(RequestWarning("thinking.budget_tokens", note))
        if thinking is not None and thinking.display == "summarized":
            warnings.append(RequestWarning("thinking.display", "thinking is sent unabridged."))
        if any(tool.get("input_examples") for tool in self.tools or ()):
            warnings.append(RequestWarning("tools", "input_examples: chat templates have no place for them."))
        return warnings

    def check(self) -> None:
        """Raises InvalidRequestError for what cannot go together."""
        thinking = self.thinking
        if thinking is None:
            return
        if thinking.type == "enabled" and thinking.budget_tokens is None:
            raise InvalidRequestError(
                "Missing required field: 'thinking.budget_tokens'.", param="thinking.budget_tokens"
            )
        if thinking.type != "enabled" and thinking.budget_tokens is not None:
            raise InvalidRequestError(
                "'thinking.budget_tokens' is only allowed with type enabled.", param="thinking.budget_tokens"
            )
        if thinking.budget_tokens is not None and thinking.budget_tokens < MIN_BUDGET_TOKENS:
            raise InvalidRequestError(
                f"'thinking.budget_tokens' must be at least {MIN_BUDGET_TOKENS}, not "
                f"{thinking.budget_tokens}.",
                param="thinking.budget_tokens",
            )


class MessagesRequest(CountTokensRequest, kw_only=True):
    """The body of POST /v1/messages. The last group is not Anthropic's."""

    max_tokens: Annotated[int, Meta(description="Limit on thinking and answer; 0 fills the cache only.")]
    stream: Annotated[bool | None, Meta(description="Answer with events.")] = None
    stop_sequences: Annotated[list[str] | None, Meta(description="Texts at which the answer ends.")] = None
    temperature: Annotated[float | None, Meta(description="Sampling temperature, 0 for greedy.")] = None
    top_k: Annotated[int | None, Meta(description="Sample among so many of the likeliest.")] = None
    top_p: Annotated[float | None, Meta(description="Nucleus sampling.")] = None
    metadata: Annotated[Metadata | None, Meta(description="A label, written to the log.")] = None

    seed: Annotated[int | None, Meta(description="The same seed samples the same answer.")] = None
    min_p: Annotated[float | None, Meta(description="Least share of the likeliest's probability.")] = None
    repetition_penalty: Annotated[float | None, Meta(description="Above 1 against repetition.")] = None
    cache_salt: Annotated[str | None, Meta(description="Share cached prefixes with this salt only.")] = None
    priority: Annotated[int | None, Meta(description="Lower runs earlier.")] = None

    def check(self) -> None:
        super().check()
        if self.cache_salt == "":
            raise InvalidRequestError("'cache_salt' must not be empty.", param="cache_salt")
        budget = self.thinking.budget_tokens if self.thinking is not None else None
        if budget is not None and budget >= self.max_tokens:
            raise InvalidRequestError(
                f"'thinking.budget_tokens' ({budget}) must be less than max_tokens ({self.max_tokens}).",
                param="thinking.budget_tokens",
            )

    def sampling_params(self) -> SamplingParams:
        """Raises InvalidRequestError naming the field as the client wrote it, but for those renamed below."""
        values = {name: getattr(self, name) for name in _PLAIN_FIELDS}
        return SamplingParams(
            max_tokens=self.max_tokens,
            stop=tuple(self.stop_sequences or ()),
            structured_outputs=self.structured_outputs(),
            **{name: value for name, value in values.items() if value is not None},
        )


_PLAIN_FIELDS: Final = ("temperature", "top_k", "top_p", "seed", "min_p", "repetition_penalty")


def _function_tool(tool: dict[str, Any], path: str, *, reader: NestedReader) -> FunctionTool:
    tool_type = tool.get("type")
    if isinstance(tool_type, str) and tool_type != "custom":
        raise UnsupportedFieldError(
            f"'{path}.type': tools of type {tool_type[:60]!r} are not supported by this server; only tools "
            "with an input_schema of your own are.",
            param=f"{path}.type",
        )
    checked = reader.read(tool, ToolBody, path=path)
    unsupported = {
        "allowed_callers": checked.allowed_callers not in (None, ["direct"]),
        "defer_loading": bool(checked.defer_loading),
    }
    for name, is_asked_for in unsupported.items():
        if is_asked_for:
            raise UnsupportedFieldError(
                f"'{path}.{name}' is not supported by this server.", param=f"{path}.{name}"
            )
    return FunctionTool(
        name=checked.name,
        description=checked.description,
        parameters=checked.input_schema,
        strict=bool(checked.strict),
    )
