"""What a request asks of the sampler, and when it wants to stop.

Owns the ranges of each parameter. The server translates API fields into this; the offline API
takes it as it is. How the parameters act on logits is in `kernels/sampling.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from graphllm.errors import InvalidRequestError
from graphllm.structured_outputs import StructuredOutputs

MAX_LOGPROBS = 20
MAX_PROMPT_LOGPROBS = 2**19  # of one request: a token's own and its alternatives, for every token
MAX_LOGIT_BIAS = 512
MAX_STOP_TOKEN_IDS = 64
MAX_STOP_STRINGS = 32
MAX_ALLOWED_TOKEN_IDS = 8192
MAX_BAD_WORDS = 128
MAX_BAD_WORD_LENGTH = 256  # characters
MAX_BAD_WORDS_LENGTH = 2048  # characters of all of them: they are tokenized on the event loop
MAX_SEED = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """One request's sampling parameters; validated at construction.

    temperature: 0 is greedy. top_k: 0 or -1 keeps all. top_p in (0, 1], min_p in [0, 1].
    seed: None draws one at admission. repetition_penalty > 0 over prompt and output; presence and
    frequency penalties in [-2, 2] over the output. logit_bias: token id to a bias in [-100, 100].
    logprobs: number of alternatives reported for each token, None for no logprobs at all.
    prompt_logprobs: the same for each token of the prompt but the first.
    max_tokens: None means up to the context's end; with 0 the prompt is computed and nothing generated.
    allowed_token_ids: no other token is sampled. bad_words: texts that are not produced, neither at the
    beginning of a word nor within one. structured_outputs: what the output must look like.
    shown_special_token_ids: special tokens that are part of the text although skip_special_tokens is on.

    Raises InvalidRequestError, whose `param` is the field's name.
    """

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    structured_outputs: StructuredOutputs | None = None
    skip_special_tokens: bool = True
    shown_special_token_ids: frozenset[int] = frozenset()
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        # Offline users pass lists and a bare string; the stored form is a tuple.
        for name in ("stop", "stop_token_ids", "bad_words"):
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
        if self.allowed_token_ids is not None:
            object.__setattr__(
                self, "allowed_token_ids", _as_tuple("allowed_token_ids", self.allowed_token_ids)
            )
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        _check_int("n", self.n, low=1, high=128)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, low=0)
        _check_int("min_tokens", self.min_tokens, low=0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) is larger than max_tokens ({self.max_tokens}).",
                param="min_tokens",
            )
        _check_float("temperature", self.temperature, low=0.0, high=100.0)
        _check_int("top_k", self.top_k, low=0)
        _check_float("top_p", self.top_p, low=0.0, high=1.0, low_open=True)
        _check_float("min_p", self.min_p, low=0.0, high=1.0)
        if self.seed is not None:
            _check_int("seed", self.seed, low=-MAX_SEED, high=MAX_SEED - 1)
        _check_float("repetition_penalty", self.repetition_penalty, low=0.0, high=100.0, low_open=True)
        _check_float("presence_penalty", self.presence_penalty, low=-2.0, high=2.0)
        _check_float("frequency_penalty", self.frequency_penalty, low=-2.0, high=2.0)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, low=0, high=MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check_int("prompt_logprobs", self.prompt_logprobs, low=0, high=MAX_LOGPROBS)
        self._check_logit_bias()
        self._check_stops()
        self._check_constraints()

    def _check_logit_bias(self) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, dict):
            raise InvalidRequestError(
                f"logit_bias must map token ids to numbers, not {self.logit_bias!r}.", param="logit_bias"
            )
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequestError(
                f"logit_bias has {len(self.logit_bias)} entries; at most {MAX_LOGIT_BIAS} are allowed.",
                param="logit_bias",
            )
        for token_id, bias in self.logit_bias.items():
            _check_int("logit_bias", token_id, low=0)
            _check_float("logit_bias", bias, low=-100.0, high=100.0)

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(f"At most {MAX_STOP_STRINGS} stop strings are allowed.", param="stop")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InvalidRequestError("Stop strings must be non-empty strings.", param="stop")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequestError(
                f"At most {MAX_STOP_TOKEN_IDS} stop_token_ids are allowed.", param="stop_token_ids"
            )
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, low=0)

    def _check_constraints(self) -> None:
        allowed = self.allowed_token_ids
        if allowed is not None:
            if not 0 < len(allowed) <= MAX_ALLOWED_TOKEN_IDS:
                raise InvalidRequestError(
                    f"allowed_token_ids must have 1 to {MAX_ALLOWED_TOKEN_IDS} ids, not {len(allowed)}.",
                    param="allowed_token_ids",
                )
            if not all(type(token_id) is int for token_id in allowed) or min(allowed) < 0:
                for token_id in allowed:  # says which one
                    _check_int("allowed_token_ids", token_id, low=0)
        if len(self.bad_words) > MAX_BAD_WORDS:
            raise InvalidRequestError(f"At most {MAX_BAD_WORDS} bad_words are allowed.", param="bad_words")
        for word in self.bad_words:
            if not isinstance(word, str) or not 0 < len(word) <= MAX_BAD_WORD_LENGTH:
                raise InvalidRequestError(
                    f"bad_words must be strings of 1 to {MAX_BAD_WORD_LENGTH} characters.", param="bad_words"
                )
        if sum(map(len, self.bad_words)) > MAX_BAD_WORDS_LENGTH:
            raise InvalidRequestError(
                f"bad_words have more than {MAX_BAD_WORDS_LENGTH} characters together.", param="bad_words"
            )
        if self.structured_outputs is not None and not isinstance(self.structured_outputs, StructuredOutputs):
            raise InvalidRequestError(
                f"structured_outputs must be a StructuredOutputs, not {self.structured_outputs!r:.60}.",
                param="structured_outputs",
            )

    @property
    def is_constrained(self) -> bool:
        """Whether the host decides, token by token, what may be sampled."""
        return (
            self.allowed_token_ids is not None or bool(self.bad_words) or self.structured_outputs is not None
        )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def check_token_ids(self, vocab_size: int) -> None:
        """Raise InvalidRequestError for a token id that the model does not have."""
        for token_id in self.logit_bias or ():
            if token_id >= vocab_size:
                raise InvalidRequestError(
                    f"logit_bias names token {token_id}, but the vocabulary has {vocab_size} tokens.",
                    param="logit_bias",
                )
        for name in ("stop_token_ids", "allowed_token_ids"):
            token_id = max(getattr(self, name) or (), default=0)
            if token_id >= vocab_size:
                raise InvalidRequestError(
                    f"{name} names token {token_id}, but the vocabulary has {vocab_size} tokens.", param=name
                )


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, str) and name in ("stop", "bad_words"):
        return (value,)
    if not isinstance(value, list | tuple):
        raise InvalidRequestError(f"{name} must be a list, not {value!r}.", param=name)
    return tuple(value)


def _check_int(name: str, value: Any, *, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(f"{name} must be an integer, not {value!r}.", param=name)
    if value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidRequestError(f"{name} must be {limit}, not {value}.", param=name)


def _check_float(name: str, value: Any, *, low: float, high: float, low_open: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequestError(f"{name} must be a number, not {value!r}.", param=name)
    if not math.isfinite(value) or value < low or value > high or (low_open and value == low):
        bracket = "(" if low_open else "["
        raise InvalidRequestError(f"{name} must be in {bracket}{low:g}, {high:g}], not {value}.", param=name)
