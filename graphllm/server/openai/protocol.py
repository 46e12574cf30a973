"""The requests of the OpenAI API as this server honours them: one msgspec struct a body.

Owns which fields exist, their types, and the translation into `SamplingParams`. Fields that are
known but not honoured are in `known_fields.py`; how a body becomes one of these structs, and what
the client reads when it does not, is in `decoding.py`. Ranges are checked by `SamplingParams`.

Sampling defaults are OpenAI's (temperature 1, top_p 1), whatever the checkpoint's
generation_config.json says, so that a request means the same with every model.
"""

from __future__ import annotations

from typing import Any

import msgspec

from graphllm.errors import InvalidRequestError
from graphllm.sampling_params import SamplingParams

# OpenAI's default for /v1/completions; a chat without a limit runs to the end of the context.
DEFAULT_COMPLETION_TOKENS = 16


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """`stream_options`; `include_obfuscation` and `continuous_usage_stats` may only be false."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class FunctionCall(msgspec.Struct, forbid_unknown_fields=True):
    """The function an assistant message of the history called."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    """One tool call of an assistant message of the history."""

    function: FunctionCall
    id: str | None = None
    type: str | None = None


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One message of a chat. Clients send whole assistant answers back, empty fields included."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: Any = None
    audio: Any = None
    function_call: Any = None
    annotations: Any = None
    reasoning: Any = None
    reasoning_content: Any = None


class SamplingFields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The fields that chat and text completions have in common; null means the default.

    `user` and the rest of the last group change nothing here whatever their value.
    """

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    cache_salt: str | None = None

    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def checked_cache_salt(self) -> str | None:
        """The salt of the prompt's KV, which only requests of the same salt share.

        Raises InvalidRequestError for an empty one, which would look like protection and be none.
        """
        if self.cache_salt == "":
            raise InvalidRequestError("'cache_salt' must not be empty.", param="cache_salt")
        return self.cache_salt

    def in_client_terms(self, error: InvalidRequestError) -> InvalidRequestError:
        """The error with the engine's name of a field replaced by what the client wrote."""
        return error


class ChatCompletionRequest(SamplingFields, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    parallel_tool_calls: bool | None = None

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
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return _sampling_params(self, max_tokens=max_tokens, logprobs=logprobs)

    def in_client_terms(self, error: InvalidRequestError) -> InvalidRequestError:
        if error.param == "prompt":
            error.param = "messages"
        elif error.param == "logprobs":
            error.param = "top_logprobs"
            error.message = error.message.replace("logprobs", "top_logprobs", 1)
        elif error.param == "max_tokens" and self.max_completion_tokens is not None:
            error.param = "max_completion_tokens"
            error.message = error.message.replace("max_tokens", "max_completion_tokens")
        return error


class CompletionRequest(SamplingFields, kw_only=True):
    """The body of POST /v1/completions.

    `prompt` is a text, a list of texts, a list of token ids, or a list of such lists; which of them
    is told apart in `prompts.py`.
    """

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None

    def sampling_params(self) -> SamplingParams:
        """Raises InvalidRequestError naming the field as the client wrote it."""
        max_tokens = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        return _sampling_params(self, max_tokens=max_tokens, logprobs=self.logprobs)


def _sampling_params(
    request: SamplingFields, *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    fields: dict[str, Any] = {"max_tokens": max_tokens, "logprobs": logprobs}
    for name in _PLAIN_FIELDS:
        value = getattr(request, name)
        if value is not None:
            fields[name] = value
    if request.logit_bias is not None:
        fields["logit_bias"] = _token_biases(request.logit_bias)
    try:
        return SamplingParams(**fields)
    except InvalidRequestError as error:
        raise request.in_client_terms(error) from None


_PLAIN_FIELDS = (
    "n",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
)


def _token_biases(logit_bias: dict[str, float]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, bias in logit_bias.items():
        # A limit on the digits, because int() refuses thousands of them with another error.
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequestError(
                f"logit_bias keys must be token ids, not {key[:40]!r}.", param="logit_bias"
            )
        biases[int(key)] = bias
    return biases
