"""The body of POST /v1/responses as this server honours it, and what it means.

Owns the fields, their types and their translation into sampling parameters, tools and a response format.
Input items are `input_items.py`'s; fields that are known and not honoured are in `known_fields.py`. Sampling
defaults are OpenAI's, as in `openai/protocol.py`.
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
from graphllm.server.openai.protocol import token_biases
from graphllm.structured_outputs import StructuredOutputs

LOGPROBS_INCLUDE: Final = "message.output_text.logprobs"
ENCRYPTED_INCLUDE: Final = "reasoning.encrypted_content"
# Of tools that run at OpenAI: there is nothing here that could be included.
OTHER_INCLUDES: Final = (
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
)
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_LENGTH = 64
MAX_METADATA_VALUE_LENGTH = 512

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Summary = Literal["auto", "concise", "detailed"]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_obfuscation: bool | None = None


class ReasoningOptions(msgspec.Struct, forbid_unknown_fields=True):
    """generate_summary is the older name of summary."""

    effort: Effort | None = None
    summary: Summary | None = None
    generate_summary: Summary | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None
    mode: Literal["standard", "pro"] | None = None


class TextFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextOptions(msgspec.Struct, forbid_unknown_fields=True):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class FunctionToolBody(msgspec.Struct, forbid_unknown_fields=True):
    """A tool of type function."""

    type: str
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    allowed_callers: list[str] | None = None
    defer_loading: bool | None = None
    output_schema: dict[str, Any] | None = None
    is_async: bool | None = msgspec.field(default=None, name="async")


class NamedToolChoice(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    name: str


class AllowedToolsChoice(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    mode: Literal["auto", "required"]
    tools: list[NamedToolChoice]


class ResponsesRequest(ModelBody, kw_only=True):
    """The body of POST /v1/responses; null means the default."""

    input: Annotated[
        str | list[dict[str, Any]],
        Meta(description="A text, or items: messages, function calls and outputs."),
    ]
    instructions: Annotated[str | None, Meta(description="A system message before everything else.")] = None
    previous_response_id: Annotated[
        str | None, Meta(description="The stored response whose conversation goes on.")
    ] = None
    store: Annotated[bool | None, Meta(description="Keep the response for later (default true).")] = None
    background: Annotated[bool | None, Meta(description="Run without a waiting client.")] = None
    stream: Annotated[bool | None, Meta(description="Answer with events.")] = None
    stream_options: Annotated[StreamOptions | None, Meta(description="Events are never obfuscated.")] = None
    include: Annotated[list[str] | None, Meta(description=f"Further content: {LOGPROBS_INCLUDE}.")] = None
    tools: Annotated[list[dict[str, Any]] | None, Meta(description="Functions that may be called.")] = None
    tool_choice: Annotated[
        str | dict[str, Any] | None,
        Meta(description="auto, none, required, one function, or some of them."),
    ] = None
    parallel_tool_calls: Annotated[bool | None, Meta(description="More than one call at once.")] = None
    text: Annotated[TextOptions | None, Meta(description="The answer's format: text or JSON.")] = None
    reasoning: Annotated[ReasoningOptions | None, Meta(description="Effort, and whether as summary.")] = None
    max_output_tokens: Annotated[int | None, Meta(description="Limit on reasoning and answer.")] = None
    truncation: Annotated[
        Literal["auto", "disabled"] | None,
        Meta(description="auto drops the oldest messages that do not fit."),
    ] = None
    temperature: Annotated[float | None, Meta(description="Sampling temperature, 0 for greedy.")] = None
    top_p: Annotated[float | None, Meta(description="Nucleus sampling.")] = None
    top_logprobs: Annotated[int | None, Meta(description="Alternatives with each logprob.")] = None
    metadata: Annotated[dict[str, str] | None, Meta(description="Labels, kept with the response.")] = None
    user: Annotated[str | None, Meta(description="A label, repeated in the response.")] = None
    safety_identifier: Annotated[str | None, Meta(description="A label, repeated in the response.")] = None
    prompt_cache_key: Annotated[str | None, Meta(description="A label, repeated in the response.")] = None

    # Those that other servers have here too.
    top_k: Annotated[int | None, Meta(description="Sample among so many of the likeliest.")] = None
    min_p: Annotated[float | None, Meta(description="Least share of the likeliest's probability.")] = None
    seed: Annotated[int | None, Meta(description="The same seed samples the same answer.")] = None
    min_tokens: Annotated[int | None, Meta(description="No end before so many tokens.")] = None
    repetition_penalty: Annotated[float | None, Meta(description="Above 1 against repetition.")] = None
    presence_penalty: Annotated[float | None, Meta(description="Against tokens that were used.")] = None
    frequency_penalty: Annotated[float | None, Meta(description="Against tokens by how often.")] = None
    logit_bias: Annotated[dict[str, float] | None, Meta(description="Token ids to biases.")] = None
    stop: Annotated[str | list[str] | None, Meta(description="Texts at which the answer ends.")] = None
    stop_token_ids: Annotated[list[int] | None, Meta(description="Tokens at which it ends.")] = None
    ignore_eos: Annotated[bool | None, Meta(description="Do not end at the end-of-text token.")] = None
    skip_special_tokens: Annotated[bool | None, Meta(description="Leave special tokens out.")] = None
    include_stop_str_in_output: Annotated[bool | None, Meta(description="Keep the stop text.")] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, Meta(description="Further names for the chat template.")
    ] = None
    cache_salt: Annotated[str | None, Meta(description="Share cached prefixes with this salt only.")] = None
    priority: Annotated[int | None, Meta(description="Lower runs earlier.")] = None

    @property
    def is_stored(self) -> bool:
        return self.store is not False

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or LOGPROBS_INCLUDE in (self.include or ())

    @property
    def wants_summary(self) -> bool:
        reasoning = self.reasoning
        return reasoning is not None and (reasoning.summary or reasoning.generate_summary) is not None

    @property
    def client_names(self) -> dict[str, str]:
        """From the names of the shared code to those that this request used."""
        has_schema = self.text is not None and self.text.format is not None
        return {
            "messages": "input",
            "prompt": "input",
            "max_tokens": "max_output_tokens",
            "logprobs": "top_logprobs",
            # Without a schema of its own, what was compiled is that of the tools.
            "structured_outputs": "text.format.schema" if has_schema else "tools",
            "reasoning_effort": "reasoning.effort",
        }

    def sampling_params(self) -> SamplingParams:
        """Raises InvalidRequestError naming the field as the client wrote it."""
        if self.max_output_tokens is not None and self.max_output_tokens < 1:
            raise InvalidRequestError(
                f"max_output_tokens must be at least 1, not {self.max_output_tokens}.",
                param="max_output_tokens",
            )
        values = {name: getattr(self, name) for name in _PLAIN_FIELDS}
        return SamplingParams(
            logit_bias=token_biases(self.logit_bias) if self.logit_bias is not None else None,
            max_tokens=self.max_output_tokens,
            logprobs=(self.top_logprobs or 0) if self.wants_logprobs else None,
            structured_outputs=self._structured_outputs(),
            **{name: value for name, value in values.items() if value is not None},
        )

    def function_tools(self, reader: NestedReader) -> tuple[FunctionTool, ...]:
        """Raises InvalidRequestError or UnsupportedFieldError naming `tools[i]`."""
        return distinct_tools(self.tools or (), partial(_function_tool, reader=reader))

    def chosen_tools(self, tools: tuple[FunctionTool, ...], reader: NestedReader) -> ToolChoice:
        """Raises InvalidRequestError or UnsupportedFieldError naming `tool_choice`."""
        choice = self.tool_choice
        if choice is None:
            return ToolChoice()
        if isinstance(choice, str):
            if choice not in _MODES:
                raise _wrong_choice(f"must be one of {', '.join(_MODES)} or an object, not {choice[:40]!r}")
            return ToolChoice(mode=_MODES[choice])
        match choice.get("type"):
            case "function":
                named = reader.read(choice, NamedToolChoice, path="tool_choice")
                return ToolChoice(mode=ToolMode.REQUIRED, allowed_names=_known((named.name,), tools))
            case "allowed_tools":
                allowed = reader.read(choice, AllowedToolsChoice, path="tool_choice")
                names = tuple(tool.name for tool in allowed.tools)
                return ToolChoice(mode=_MODES[allowed.mode], allowed_names=_known(names, tools))
            case str() as other:
                raise UnsupportedFieldError(
                    f"'tool_choice.type': {other[:60]!r} is not supported by this server; function and "
                    "allowed_tools are.",
                    param="tool_choice.type",
                )
            case _:
                raise _wrong_choice("needs a type: function or allowed_tools")

    def own_warnings(self) -> list[RequestWarning]:
        """Values of honoured fields that cannot be honoured. Raises InvalidRequestError for unknown ones."""
        warnings = []
        for position, name in enumerate(self.include or ()):
            if name == ENCRYPTED_INCLUDE:
                note = "reasoning is not encrypted: it is in the items' content, which can be sent back."
                warnings.append(RequestWarning("include", f"{name}: {note}"))
            elif name in OTHER_INCLUDES:
                warnings.append(RequestWarning("include", f"{name}: there are no such items here."))
            elif name != LOGPROBS_INCLUDE:
                known = ", ".join((LOGPROBS_INCLUDE, ENCRYPTED_INCLUDE, *OTHER_INCLUDES))
                raise InvalidRequestError(
                    f"'include[{position}]' must be one of {known}.", param=f"include[{position}]"
                )
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            warnings.append(RequestWarning("stream_options.include_obfuscation", "events are not padded."))
        if self.text is not None and self.text.verbosity in ("low", "high"):
            warnings.append(RequestWarning("text.verbosity", "the model is not told; say so in the text."))
        if self.wants_summary:
            note = "the reasoning is sent as its summary, unabridged."
            warnings.append(RequestWarning("reasoning.summary", note))
        if self.reasoning is not None and self.reasoning.mode == "pro":
            warnings.append(RequestWarning("reasoning.mode", "there is one mode."))
        if self.reasoning is not None and self.reasoning.context in ("current_turn", "all_turns"):
            note = "which turns' reasoning the model sees is its chat template's choice."
            warnings.append(RequestWarning("reasoning.context", note))
        return warnings

    def check(self) -> None:
        """What can be wrong with fields taken together, and with labels. Raises InvalidRequestError."""
        if self.background and not self.is_stored:
            raise InvalidRequestError("'background' needs 'store' to be true.", param="background")
        if self.cache_salt == "":
            raise InvalidRequestError("'cache_salt' must not be empty.", param="cache_salt")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "'stream_options' is only allowed when 'stream' is true.", param="stream_options"
            )
        if isinstance(self.input, list) and not self.input and self.previous_response_id is None:
            raise InvalidRequestError("'input' must not be empty.", param="input")
        metadata = self.metadata or {}
        if len(metadata) > MAX_METADATA_PAIRS:
            raise InvalidRequestError(
                f"'metadata' has {len(metadata)} pairs; at most {MAX_METADATA_PAIRS} are allowed.",
                param="metadata",
            )
        for key, value in metadata.items():
            if len(key) > MAX_METADATA_KEY_LENGTH or len(value) > MAX_METADATA_VALUE_LENGTH:
                raise InvalidRequestError(
                    f"'metadata': keys have at most {MAX_METADATA_KEY_LENGTH} characters, values "
                    f"{MAX_METADATA_VALUE_LENGTH}.",
                    param="metadata",
                )

    def _structured_outputs(self) -> StructuredOutputs | None:
        text_format = self.text.format if self.text is not None else None
        if text_format is None or text_format.type == "text":
            return None
        if text_format.type == "json_object":
            return StructuredOutputs(json_object=True)
        if text_format.schema is None:
            raise InvalidRequestError(
                "Missing required field: 'text.format.schema'.", param="text.format.schema"
            )
        schema: Any = text_format.schema
        return StructuredOutputs(json=schema)


_MODES: Final = {"auto": ToolMode.AUTO, "none": ToolMode.NONE, "required": ToolMode.REQUIRED}
_PLAIN_FIELDS: Final = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "min_tokens",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
)


def _function_tool(tool: dict[str, Any], path: str, *, reader: NestedReader) -> FunctionTool:
    tool_type = tool.get("type")
    if isinstance(tool_type, str) and tool_type != "function":
        raise UnsupportedFieldError(
            f"'{path}.type': tools of type {tool_type[:60]!r} are not supported by this server; only "
            "'function' is.",
            param=f"{path}.type",
        )
    checked = reader.read(tool, FunctionToolBody, path=path)
    unsupported = {
        "allowed_callers": checked.allowed_callers not in (None, ["direct"]),
        "defer_loading": bool(checked.defer_loading),
        "output_schema": checked.output_schema is not None,
        "async": bool(checked.is_async),
    }
    for name, is_asked_for in unsupported.items():
        if is_asked_for:
            raise UnsupportedFieldError(
                f"'{path}.{name}' is not supported by this server.", param=f"{path}.{name}"
            )
    return FunctionTool(
        name=checked.name,
        description=checked.description,
        parameters=checked.parameters,
        strict=bool(checked.strict),
    )


def _known(names: tuple[str, ...], tools: tuple[FunctionTool, ...]) -> tuple[str, ...]:
    known = {tool.name for tool in tools}
    for name in names:
        if name not in known:
            raise _wrong_choice(f"names {name[:80]!r}, which is not among the tools")
    return names


def _wrong_choice(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"'tool_choice' {reason}.", param="tool_choice")
