"""What generation produces: increments for sinks, and whole results for the offline API."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a sequence ended, in OpenAI's words where OpenAI has them."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probabilities at one output position, from the unmodified logits.

    top: (token id, logprob) pairs, most likely first; as many as the request asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class SequenceDelta:
    """What one step, or the end, adds to one sequence of a request.

    `text` may be empty while characters are incomplete or a stop string may be beginning.
    `token_ids` are those sampled since the last delta, the stop token included.
    `stop_reason` is the stop string or stop token id that matched; None for the end-of-text token.
    `num_cached_tokens` of the request's prompt were in the prefix cache and not computed.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    num_cached_tokens: int = 0


@dataclass(slots=True)
class CompletionOutput:
    """One finished sequence of a request (offline API; the shape vLLM users know)."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


@dataclass(slots=True)
class RequestOutput:
    """One finished request (offline API)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
