"""The fields that chat and text completions have in common, and their translation into `SamplingParams`.

Owns which of them exist and their types; each says in a line what it does, for `docs/api-fields.md` and
`/openapi.json`. Fields that are known and not honoured are in `known_fields.py`, what the output must look
like in `output_form.py`; how a body becomes a struct, and what the client reads when it does not, is in
`generation/decoding.py`. Ranges are checked by `SamplingParams`.

Sampling defaults are OpenAI's (temperature 1, top_p 1), whatever the checkpoint's generation_config.json
says, so that a request means the same with every model. Null means the default everywhere.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from graphllm.errors import InvalidRequestError, UnsupportedFieldError
from graphllm.sampling_params import SamplingParams
from graphllm.server.generation.prompts import Truncation, truncation
from graphllm.server.openai.output_form import OutputFormFields, in_words_of

logger = logging.getLogger(__name__)

_LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """`stream_options`; `include_obfuscation` may only be false."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(OutputFormFields, kw_only=True):
    """The fields that chat and text completions have in common."""

    stream: Annotated[bool | None, Meta(description="Answer with server-sent events as text comes.")] = None
    stream_options: Annotated[
        StreamOptions | None,
        Meta(description="include_usage adds a last chunk with usage; continuous_usage_stats, all of them."),
    ] = None
    n: Annotated[int | None, Meta(description="Choices for each prompt, 1 to 128.")] = None
    best_of: Annotated[
        int | None, Meta(description="Only with the value of n: no more choices are made than returned.")
    ] = None
    max_tokens: Annotated[int | None, Meta(description="Most tokens to generate for each choice.")] = None
    min_tokens: Annotated[int | None, Meta(description="No end before so many tokens.")] = None
    temperature: Annotated[float | None, Meta(description="0 is greedy; up to 100, by default 1.")] = None
    top_p: Annotated[
        float | None, Meta(description="Sample from the likeliest tokens that make up this share, above 0.")
    ] = None
    top_k: Annotated[
        int | None, Meta(description="Sample from so many likeliest tokens; 0 or -1 takes all.")
    ] = None
    min_p: Annotated[
        float | None, Meta(description="Drop tokens less likely than this share of the likeliest.")
    ] = None
    seed: Annotated[int | None, Meta(description="Repeats a text, as far as its neighbours allow.")] = None
    repetition_penalty: Annotated[
        float | None, Meta(description="Above 1 makes tokens of prompt and output less likely.")
    ] = None
    presence_penalty: Annotated[
        float | None, Meta(description="-2 to 2, off the logits of tokens that the output has.")
    ] = None
    frequency_penalty: Annotated[
        float | None, Meta(description="-2 to 2, off the logits of tokens for each time the output has them.")
    ] = None
    logit_bias: Annotated[
        dict[str, float] | None, Meta(description="Token ids to what is added to their logits, -100 to 100.")
    ] = None
    stop: Annotated[
        str | list[str] | None, Meta(description="Texts that end a choice, up to 32; they are not returned.")
    ] = None
    stop_token_ids: Annotated[list[int] | None, Meta(description="Tokens that end a choice.")] = None
    ignore_eos: Annotated[bool | None, Meta(description="The end-of-text token does not end a choice.")] = (
        None
    )
    skip_special_tokens: Annotated[
        bool | None, Meta(description="Leave special tokens out of the text; on by default.")
    ] = None
    include_stop_str_in_output: Annotated[
        bool | None, Meta(description="Return the stop text or token that ended a choice, too.")
    ] = None
    no_stop_trim: Annotated[bool | None, Meta(description="SGLang's name of include_stop_str_in_output.")] = (
        None
    )
    allowed_token_ids: Annotated[
        list[int] | None, Meta(description="No other tokens than these are generated.")
    ] = None
    bad_words: Annotated[list[str] | None, Meta(description="Texts that are not generated, up to 128.")] = (
        None
    )
    prompt_logprobs: Annotated[
        int | None,
        Meta(
            description="Report each prompt token's log probability and so many alternatives; not in streams."
        ),
    ] = None
    return_token_ids: Annotated[
        bool | None, Meta(description="Answers say which tokens prompt and choices are made of.")
    ] = None
    return_tokens_as_token_ids: Annotated[
        bool | None, Meta(description="Log probabilities name tokens as token_id:N instead of by their text.")
    ] = None
    truncate_prompt_tokens: Annotated[
        int | None,
        Meta(description="Keep so many of the prompt's tokens; -1 keeps what fits beside max_tokens."),
    ] = None
    truncation_side: Annotated[
        str | None, Meta(description="left (the default) drops the prompt's beginning, right its end.")
    ] = None
    add_special_tokens: Annotated[
        bool | None,
        Meta(description="Put the tokenizer's own tokens (BOS) around the prompt; for chats off by default."),
    ] = None
    priority: Annotated[int | None, Meta(description="Requests with a lower number run earlier.")] = None
    cache_salt: Annotated[
        str | None, Meta(description="Only requests with the same salt share cached prefixes.")
    ] = None
    user: Annotated[str | None, Meta(description="A label, logged at debug level.")] = None
    metadata: Annotated[dict[str, str] | None, Meta(description="Labels, logged at debug level.")] = None
    safety_identifier: Annotated[str | None, Meta(description="A label, logged at debug level.")] = None
    prompt_cache_key: Annotated[
        str | None,
        Meta(description="A label, logged at debug level; cached prefixes are found by themselves."),
    ] = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    def check(self) -> None:
        """What fields require of each other. Raises InvalidRequestError."""
        options = self.stream_options
        if options is not None and not self.stream:
            raise InvalidRequestError(
                "'stream_options' is only allowed when stream is true.", param="stream_options"
            )
        if options is not None and options.include_obfuscation:
            raise UnsupportedFieldError(
                "'stream_options.include_obfuscation' is not supported by this server.",
                param="stream_options.include_obfuscation",
            )
        if self.continuous_usage and not self.include_usage:
            raise InvalidRequestError(
                "'stream_options.continuous_usage_stats' is only allowed with include_usage.",
                param="stream_options.continuous_usage_stats",
            )
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequestError(
                "'prompt_logprobs' is only allowed when stream is false.", param="prompt_logprobs"
            )
        if self.best_of is not None and self.best_of != (1 if self.n is None else self.n):
            raise InvalidRequestError(
                "'best_of' is only allowed with the value of n: all choices that are made are returned.",
                param="best_of",
            )
        if self.cache_salt == "":
            # It would look like protection and be none.
            raise InvalidRequestError("'cache_salt' must not be empty.", param="cache_salt")

    def truncation(self, *, max_model_len: int, max_tokens: int | None) -> Truncation | None:
        """Raises InvalidRequestError."""
        return truncation(
            self.truncate_prompt_tokens,
            self.truncation_side,
            max_model_len=max_model_len,
            max_tokens=1 if max_tokens is None else max_tokens,
        )

    def log_labels(self, reply_id: str) -> None:
        """What a client calls its request, beside the id that the server gave it."""
        if logger.isEnabledFor(logging.DEBUG):
            labels = {name: getattr(self, name) for name in _LABELS if getattr(self, name) is not None}
            if labels:
                logger.debug("%s: %r", reply_id, labels)

    @property
    def structure_name(self) -> str:
        """The field that says what the output must look like."""
        form = self.output_form()
        return "structured_outputs" if form is None else form[0]

    def in_client_terms(self, error: InvalidRequestError) -> InvalidRequestError:
        """The error with the engine's name of a field replaced by what the client wrote."""
        if error.param == "structured_outputs":
            return in_words_of(self.structure_name, error)
        if error.param == "include_stop_str_in_output" and self.no_stop_trim is not None:
            error.param = "no_stop_trim"
        return error


def sampling_params(
    request: SamplingFields,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """The sampler's parameters of a request. Raises InvalidRequestError naming the client's field."""
    fields: dict[str, Any] = {
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
    }
    for name in _PLAIN_FIELDS:
        value = getattr(request, name)
        if value is not None:
            fields[name] = value
    if request.no_stop_trim:
        fields["include_stop_str_in_output"] = True
    if request.logit_bias is not None:
        fields["logit_bias"] = token_biases(request.logit_bias)
    if (form := request.output_form()) is not None:
        fields["structured_outputs"] = form[1]
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
    "allowed_token_ids",
    "bad_words",
)


def token_biases(logit_bias: dict[str, float]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for key, bias in logit_bias.items():
        # A limit on the digits, because int() refuses thousands of them with another error.
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequestError(
                f"logit_bias keys must be token ids, not {key[:40]!r}.", param="logit_bias"
            )
        biases[int(key)] = bias
    return biases
