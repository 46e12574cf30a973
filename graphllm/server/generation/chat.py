"""From a chat, whatever the dialect, to a request that generates the assistant's next message.

Owns what the dialects' chats have in common: how the prompt is rendered, what the answer must look like, and
how it is read. Messages for the template are `messages.py`'s, tools `tools.py`'s, reasoning and names for the
template `template_names.py`'s. Names in errors are those of `ChatRequest`'s fields; a dialect puts its own in
their place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from graphllm.errors import ContextLengthError, InvalidRequestError
from graphllm.output_formats.events import OutputParser
from graphllm.output_formats.output_format import OutputFormat
from graphllm.output_formats.registry import find_format
from graphllm.sampling_params import SamplingParams
from graphllm.server.generation.answer_form import calls_or_form
from graphllm.server.generation.messages import TemplateFeatures, template_messages
from graphllm.server.generation.prompts import Truncation, encode_truncated
from graphllm.server.generation.request import GenerationRequest, ReasoningOutput, RequestWarning
from graphllm.server.generation.template_names import template_names, thinks_by_default
from graphllm.server.generation.tools import (
    CallableTools,
    FunctionTool,
    ToolChoice,
    ToolMode,
    callable_tools,
    with_described_tools,
)
from graphllm.structured_outputs import StructuredOutputs
from graphllm.tokenizer.tokenizer import Tokenizer

__all__ = ["ChatPreparation", "ChatRequest", "FunctionTool", "PreparedChat", "ToolChoice", "ToolMode"]

# Stands at the end of the message that is to be continued, to find the place in the rendered text.
# Private-use characters, which no template looks for.
_END_MARK = "\ue0f5\ue0f6graphllm\ue0f6\ue0f5"
# How much of the prompt's end is looked at for reasoning that was opened there.
_TAIL_CHARS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """One chat in no dialect's words.

    messages: as `messages.py` takes them. template_kwargs: further names for the template; documents:
    another, for templates that read it. add_generation_prompt, continue_final_message: whether the text ends
    with the opening of the assistant's message, or in the middle of its last one. add_special_tokens: what
    the tokenizer puts around texts, on top of what the template writes. separates_reasoning: whether
    reasoning is told apart from the answer; reasoning_output: what becomes of it then. reasoning_effort:
    "none" or how much, as templates that know it take it. truncated: keep so many of the prompt's tokens;
    None keeps all and refuses what does not fit.
    """

    messages: Sequence[Mapping[str, Any]]
    params: SamplingParams
    tools: tuple[FunctionTool, ...] = ()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    parallel_tool_calls: bool = True
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    documents: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    separates_reasoning: bool = True
    reasoning_output: ReasoningOutput = ReasoningOutput.STREAM
    reasoning_effort: str | None = None
    truncated: Truncation | None = None
    cache_salt: str | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class PreparedChat:
    """The request, and the fields that were accepted and could not be honoured."""

    generation: GenerationRequest
    warnings: tuple[RequestWarning, ...]


class ChatPreparation:
    """Prepares the chats of one model. Raises InvalidRequestError for a model without a chat template."""

    def __init__(self, tokenizer: Tokenizer, max_model_len: int, output_format: OutputFormat) -> None:
        if tokenizer.chat_template is None:
            raise InvalidRequestError(
                "This model has no chat template; use /v1/completions.", param="messages"
            )
        self._tokenizer = tokenizer
        self._template = tokenizer.chat_template
        self._max_model_len = max_model_len
        self._format = output_format
        self.features = TemplateFeatures.of(tokenizer.chat_template)

    def prepare(self, chat: ChatRequest) -> PreparedChat:
        """Render, tokenize, and say how the answer is constrained and read.

        Raises InvalidRequestError (its `param` in the words of `ChatRequest`), ContextLengthError.
        """
        messages, warnings = template_messages(chat.messages, self.features)
        tools = callable_tools(chat.tools, chat.tool_choice)
        self._check_length(messages, tools.shown)
        names, name_warnings = template_names(
            chat.template_kwargs,
            variables=self.features.variables,
            documents=chat.documents,
            reasoning_effort=chat.reasoning_effort,
        )
        warnings += name_warnings
        text = self._render(chat, messages, tools.shown, names)
        params = chat.params
        is_enforced = tools.is_required or params.structured_outputs is not None
        opening = self._missing_opening(chat, text, names) if is_enforced else ""
        text += opening
        in_reasoning = self._format.opens_reasoning(text[-_TAIL_CHARS:])
        reading = self._reading_format(chat, tools, in_reasoning=in_reasoning)
        if is_enforced:
            structured = self._structured(chat, tools, reading, in_reasoning=in_reasoning)
            params = replace(params, structured_outputs=structured)
        warnings += _tool_warnings(
            tools, asked=chat.params.structured_outputs, used=params.structured_outputs
        )
        new_parser = self._parser_factory(chat, tools, reading, in_reasoning=in_reasoning)
        if new_parser is not None:
            params = self._with_shown_markers(params, reading, reads_calls=bool(tools.by_name))
        generation = GenerationRequest(
            prompts=[self._encode(chat, text)],
            params=params,
            new_parser=new_parser,
            reasoning_output=chat.reasoning_output,
            max_tool_calls=None if chat.parallel_tool_calls else 1,
            cache_salt=chat.cache_salt,
            priority=chat.priority,
        )
        return PreparedChat(generation, tuple(warnings))

    # -- the prompt -------------------------------------------------------------------------------

    def _render(
        self,
        chat: ChatRequest,
        messages: list[dict[str, Any]],
        shown: Sequence[FunctionTool],
        names: Mapping[str, Any],
    ) -> str:
        """The chat as the text that the model continues."""
        tools = [tool.for_template() for tool in shown] or None
        if tools is not None and not self.features.knows_tools:
            messages, tools = with_described_tools(messages, shown, self._template), None
        if chat.continue_final_message:
            messages = [*messages[:-1], _marked(messages[-1], chat)]
        text = self._template.render(
            messages,
            tools=tools,
            add_generation_prompt=chat.add_generation_prompt,
            template_kwargs=names,
            max_chars=self._max_model_len * self._tokenizer.longest_token_bytes,
        )
        if not chat.continue_final_message:
            return text
        place = text.rfind(_END_MARK)
        if place < 0:
            raise InvalidRequestError(
                "continue_final_message: this model's chat template does not show the final message.",
                param="continue_final_message",
            )
        return text[:place]

    def _check_length(self, messages: Sequence[Mapping[str, Any]], shown: Sequence[FunctionTool]) -> None:
        """Raises ContextLengthError before a chat that is far too long is put together."""
        limit = self._max_model_len
        num_chars = sum(len(message["content"]) for message in messages)
        num_chars += sum(tool.num_chars for tool in shown)
        # A message is a token or more, whatever it says.
        at_least = max(num_chars // self._tokenizer.longest_token_bytes, len(messages))
        if at_least > limit:
            raise ContextLengthError(
                f"The model's context is {limit} tokens, but the messages and tools have at least "
                f"{at_least} tokens ({num_chars} characters).",
                param="messages",
            )

    def _missing_opening(self, chat: ChatRequest, text: str, names: Mapping[str, Any]) -> str:
        """What a model would write first to reason, where it is to reason and its prompt leaves that to it.

        An answer whose form is enforced has to be told where reasoning ends, and so where it begins.
        """
        reasoning = self._format.reasoning
        if reasoning is None or self._format.messages is not None or not chat.add_generation_prompt:
            return ""
        if self._format.opens_reasoning(text[-_TAIL_CHARS:]) or text.rstrip().endswith(reasoning.ends):
            return ""
        return f"{reasoning.begins[0]}\n" if thinks_by_default(self.features.variables, names) else ""

    def _encode(self, chat: ChatRequest, text: str) -> list[int]:
        if chat.truncated is not None:
            token_ids = encode_truncated(
                text,
                self._tokenizer,
                truncated=chat.truncated,
                add_special_tokens=chat.add_special_tokens,
                param="messages",
            )
        else:
            token_ids = self._tokenizer.encode(
                text,
                add_special_tokens=chat.add_special_tokens,
                max_tokens=self._max_model_len,
                param="messages",
            )
        if not token_ids:
            raise InvalidRequestError("The rendered chat has no tokens.", param="messages")
        return token_ids

    # -- the answer -------------------------------------------------------------------------------

    def _structured(
        self, chat: ChatRequest, tools: CallableTools, reading: OutputFormat, *, in_reasoning: bool
    ) -> StructuredOutputs:
        """What enforces the answer, from behind the reasoning on."""
        ends = self._format.reasoning_ends
        if not tools.is_required:
            assert chat.params.structured_outputs is not None
            has_parts = in_reasoning or self._format.messages is not None
            form = replace(chat.params.structured_outputs, starts_after=ends if has_parts else ())
            calls = None
            if tools.by_name and self._format.messages is None:
                calls = _call_grammar(reading, tools, chat, in_reasoning=in_reasoning)
            return form if calls is None else calls_or_form(calls, form) or form
        grammar = _call_grammar(reading, tools, chat, in_reasoning=in_reasoning)
        if grammar is None:
            raise InvalidRequestError("'tools': calls of these tools cannot be enforced.", param="tools")
        has_parts = in_reasoning and self._format.messages is None
        return StructuredOutputs(grammar=grammar, starts_after=ends if has_parts else ())

    def _reading_format(self, chat: ChatRequest, tools: CallableTools, *, in_reasoning: bool) -> OutputFormat:
        """The model's own format, or the generic one where calls have to be enforced that it cannot write."""
        if not tools.is_required or _call_grammar(self._format, tools, chat, in_reasoning=in_reasoning):
            return self._format
        return replace(find_format("generic"), reasoning=self._format.reasoning)

    def _parser_factory(
        self, chat: ChatRequest, tools: CallableTools, reading: OutputFormat, *, in_reasoning: bool
    ) -> Callable[[], OutputParser] | None:
        """What reads each choice; None where all text is answer."""
        has_reasoning = reading.reasoning is not None or reading.messages is not None
        if not tools.by_name and not (chat.separates_reasoning and has_reasoning):
            return None
        return partial(
            reading.parser,
            parses_tools=bool(tools.by_name),
            tools=tools.by_name or None,
            parses_reasoning=chat.separates_reasoning,
            starts_in_reasoning=in_reasoning,
        )

    def _with_shown_markers(
        self, params: SamplingParams, reading: OutputFormat, *, reads_calls: bool
    ) -> SamplingParams:
        """Parameters that do not hide what the parser looks for."""
        texts = reading.marker_texts if reads_calls else replace(reading, calls=()).marker_texts
        added = self._tokenizer.added_tokens
        shown = {added[text] for text in texts if text in added} & self._tokenizer.special_token_ids
        return replace(params, shown_special_token_ids=frozenset(shown)) if shown else params


def _marked(message: dict[str, Any], chat: ChatRequest) -> dict[str, Any]:
    """The final message with the mark at its end. Raises InvalidRequestError where it cannot be continued."""
    if chat.add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt cannot both be true: the answer either "
            "continues the final message or begins a new one.",
            param="continue_final_message",
        )
    if not message["content"] or message.get("tool_calls"):
        raise InvalidRequestError(
            "continue_final_message: the final message has no text that could be continued.",
            param="continue_final_message",
        )
    return {**message, "content": message["content"] + _END_MARK}


def _tool_warnings(
    tools: CallableTools, *, asked: StructuredOutputs | None, used: StructuredOutputs | None
) -> list[RequestWarning]:
    """What of the tools, or of the answer's form, cannot be honoured beside the other."""
    notes = []
    if tools.is_required and asked is not None:
        note = "a call is required, so the answer is a call and has no other form."
        notes.append(RequestWarning("structured_outputs", note))
    elif tools.by_name and asked is not None and used is not None and used.kind == asked.kind:
        note = "the answer's form is enforced, so no tool can be called in this turn."
        notes.append(RequestWarning("tools", note))
    elif tools.is_strict and not tools.is_required and asked is None:
        note = "'strict' is enforced where tool_choice requires a call, and not where the model decides."
        notes.append(RequestWarning("tools", note))
    return notes


def _call_grammar(
    output_format: OutputFormat, tools: CallableTools, chat: ChatRequest, *, in_reasoning: bool
) -> str | None:
    return output_format.required_grammar(
        tools.by_name,
        names=tuple(tools.by_name),
        parallel=chat.parallel_tool_calls,
        starts_in_reasoning=in_reasoning,
    )
