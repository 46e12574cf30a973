"""The body of POST /v1/chat/completions, and what it asks in no dialect's words."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from graphllm.errors import InvalidRequestError, UnsupportedFieldError
from graphllm.sampling_params import SamplingParams
from graphllm.server.generation.chat import ChatRequest
from graphllm.server.generation.request import ReasoningOutput, RequestWarning
from graphllm.server.generation.tools import FunctionTool, ToolChoice
from graphllm.server.openai.messages import ChatMessage, plain_messages
from graphllm.server.openai.protocol import SamplingFields, sampling_params
from graphllm.server.openai.tools import (
    FunctionDefinition,
    FunctionName,
    Tool,
    ToolChoiceObject,
    function_choice,
    function_tools,
    tool_choice,
    tools_of_functions,
)


class ReasoningFields(msgspec.Struct, forbid_unknown_fields=True):
    """`reasoning`: the same as reasoning_effort and include_reasoning, as some gateways write it."""

    effort: str | None = None
    enabled: bool | None = None
    exclude: bool | None = None


class ChatCompletionRequest(SamplingFields, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(description="The conversation; content is text.")]
    max_completion_tokens: Annotated[
        int | None, Meta(description="Most tokens to generate for each choice, reasoning included.")
    ] = None
    logprobs: Annotated[bool | None, Meta(description="Report each generated token's log probability.")] = (
        None
    )
    top_logprobs: Annotated[
        int | None, Meta(description="With logprobs: so many likeliest alternatives, 0 to 20.")
    ] = None
    tools: Annotated[
        list[Tool] | None, Meta(description="Functions that the model may call; type function only.")
    ] = None
    tool_choice: Annotated[
        str | ToolChoiceObject | None,
        Meta(
            description="auto, none, required, a named function or allowed_tools; what is forced is enforced."
        ),
    ] = None
    parallel_tool_calls: Annotated[
        bool | None, Meta(description="false allows one call in an answer; later ones are dropped.")
    ] = None
    functions: Annotated[
        list[FunctionDefinition] | None, Meta(description="Older form of tools; calls come as function_call.")
    ] = None
    function_call: Annotated[
        str | FunctionName | None, Meta(description="Older form of tool_choice, with functions.")
    ] = None
    reasoning_effort: Annotated[
        str | None,
        Meta(description="none to max; told to the chat template where it reads it, with a warning if not."),
    ] = None
    reasoning: Annotated[
        ReasoningFields | None, Meta(description="effort, enabled and exclude, as some gateways write them.")
    ] = None
    include_reasoning: Annotated[
        bool | None, Meta(description="false leaves reasoning out of the answer.")
    ] = None
    separate_reasoning: Annotated[
        bool | None, Meta(description="false leaves reasoning in content, with its markers.")
    ] = None
    stream_reasoning: Annotated[
        bool | None, Meta(description="false sends reasoning in one piece when it has ended.")
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None,
        Meta(description="Names for the chat template (enable_thinking); a warning for those it ignores."),
    ] = None
    documents: Annotated[
        list[dict[str, Any]] | None, Meta(description="For chat templates that read documents.")
    ] = None
    add_generation_prompt: Annotated[
        bool | None, Meta(description="false does not open the assistant's message.")
    ] = None
    continue_final_message: Annotated[
        bool | None, Meta(description="The answer continues the text of the last message.")
    ] = None

    def chat_request(self, *, max_model_len: int) -> ChatRequest:
        """Raises InvalidRequestError naming the field as the client wrote it."""
        self.check()
        params = self.sampling_params()
        continues = bool(self.continue_final_message)
        tools, choice, is_parallel = self._tools()
        return ChatRequest(
            messages=plain_messages(self.messages),
            params=params,
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=is_parallel,
            template_kwargs=self.chat_template_kwargs or {},
            documents=self.documents,
            add_generation_prompt=(
                not continues if self.add_generation_prompt is None else self.add_generation_prompt
            ),
            continue_final_message=continues,
            add_special_tokens=bool(self.add_special_tokens),
            separates_reasoning=self.separate_reasoning is not False,
            reasoning_output=self._reasoning_output(),
            reasoning_effort=self._reasoning_effort(),
            truncated=self.truncation(max_model_len=max_model_len, max_tokens=params.max_tokens),
            cache_salt=self.cache_salt,
            priority=self.priority or 0,
        )

    def sampling_params(self) -> SamplingParams:
        """Raises InvalidRequestError naming the field as the client wrote it."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError(
                "top_logprobs is only allowed when logprobs is true.", param="top_logprobs"
            )
        max_tokens = self.max_tokens
        if self.max_completion_tokens is not None:
            if max_tokens is not None and max_tokens != self.max_completion_tokens:
                raise InvalidRequestError(
                    f"max_tokens ({max_tokens}) and max_completion_tokens ({self.max_completion_tokens}) "
                    "differ; give one of them.",
                    param="max_completion_tokens",
                )
            max_tokens = self.max_completion_tokens
        if max_tokens == 0:
            name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
            raise InvalidRequestError(f"{name} must be at least 1, not 0.", param=name)
        return sampling_params(
            self,
            max_tokens=max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            prompt_logprobs=self.prompt_logprobs,
        )

    @property
    def uses_functions(self) -> bool:
        """Whether calls are to be answered in the older form."""
        return self.functions is not None and self.tools is None

    def in_client_terms(self, error: InvalidRequestError) -> InvalidRequestError:
        if error.param == "prompt":
            error.param = "messages"
        elif error.param == "logprobs":
            error.param = "top_logprobs"
            error.message = error.message.replace("logprobs", "top_logprobs", 1)
        elif error.param == "max_tokens" and self.max_completion_tokens is not None:
            error.param = "max_completion_tokens"
            error.message = error.message.replace("max_tokens", "max_completion_tokens")
        elif error.param == "reasoning_effort" and self.reasoning_effort is None:
            error.param = "reasoning.effort"
        elif error.param in ("tools", "tool_choice") and self.uses_functions:
            older = {"tools": "functions", "tool_choice": "function_call"}[error.param]
            error.message = error.message.replace(error.param, older)
            error.param = older
        else:
            return super().in_client_terms(error)
        return error

    def warning_in_client_terms(self, warning: RequestWarning) -> RequestWarning:
        """The warning under the name of the field that the client sent."""
        if warning.field == "structured_outputs" and (form := self.output_form()) is not None:
            return RequestWarning(form[0], warning.message)
        if warning.field == "tools" and self.uses_functions:
            return RequestWarning("functions", warning.message)
        if warning.field == "reasoning_effort" and self.reasoning_effort is None:
            return RequestWarning("reasoning", warning.message)
        return warning

    @property
    def structure_name(self) -> str:
        if self._forces_call:
            return "functions" if self.uses_functions else "tools"
        return super().structure_name

    @property
    def _forces_call(self) -> bool:
        choice = self.function_call if self.uses_functions else self.tool_choice
        return choice not in (None, "auto", "none")

    def _tools(self) -> tuple[tuple[FunctionTool, ...], ToolChoice, bool]:
        """The tools, the choice among them, and whether several may be called at once."""
        is_parallel = self.parallel_tool_calls is not False
        if self.functions is None and self.function_call not in (None, "none"):
            raise InvalidRequestError(
                "'function_call' is only allowed with functions.", param="function_call"
            )
        if self.functions is not None:
            if self.tools or self.tool_choice is not None:
                raise InvalidRequestError(
                    "'functions' is the older form of tools and cannot be mixed with it.", param="functions"
                )
            # That form has room for one call.
            return tools_of_functions(self.functions), function_choice(self.function_call), False
        choice = tool_choice(self.tool_choice)
        names_one = isinstance(self.tool_choice, ToolChoiceObject) and self.tool_choice.function is not None
        return function_tools(self.tools or ()), choice, is_parallel and not names_one

    def _reasoning_effort(self) -> str | None:
        asked = self.reasoning
        if asked is None:
            return self.reasoning_effort
        effort = asked.effort
        if effort is None and asked.enabled is not None:
            effort = "medium" if asked.enabled else "none"
        if None not in (effort, self.reasoning_effort) and effort != self.reasoning_effort:
            raise InvalidRequestError("'reasoning' and reasoning_effort differ.", param="reasoning")
        return self.reasoning_effort if effort is None else effort

    def _reasoning_output(self) -> ReasoningOutput:
        is_excluded = self.reasoning is not None and bool(self.reasoning.exclude)
        if self.include_reasoning is False or is_excluded:
            if self.separate_reasoning is False:
                raise UnsupportedFieldError(
                    "'separate_reasoning': reasoning that is left in content cannot be left out too.",
                    param="separate_reasoning",
                )
            return ReasoningOutput.HIDE
        return ReasoningOutput.WHOLE if self.stream_reasoning is False else ReasoningOutput.STREAM
