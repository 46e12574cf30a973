"""What generation produces: increments for sinks, and whole results for the offline API."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import overload


class FinishReason(StrEnum):
    """Why a sequence ended, in OpenAI's words where OpenAI has them."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probabilities at one position, from the unmodified logits.

    top: (token id, logprob) pairs, most likely first; as many as the request asked for.
    rank: 1 for the most likely token, of a prompt's tokens; None for sampled ones.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class PromptScores:
    """What one step found for some neighbouring tokens of a prompt.

    logprobs (float32), ranks (int32): one for each token. top_ids (int32), top_logprobs (float32): `num_top`
    for each, most likely first, one token's behind the other's.
    """

    logprobs: array[float]
    ranks: array[int]
    top_ids: array[int]
    top_logprobs: array[float]


class PromptLogprobs(Sequence[TokenLogprob | None]):
    """One entry for each token of a prompt: its logprob, rank and the `num_top` likeliest in its place.

    The first token has none (None). Entries are made when they are asked for, since those of a long prompt
    would be megabytes of objects: 8 bytes a token and 8 for each alternative are kept.
    """

    __slots__ = ("_prompt_token_ids", "_scores", "num_top")

    def __init__(self, prompt_token_ids: Sequence[int], num_top: int) -> None:
        self.num_top = num_top
        self._prompt_token_ids = prompt_token_ids
        self._scores = PromptScores(array("f"), array("i"), array("i"), array("f"))

    @property
    def num_scored(self) -> int:
        """Tokens whose scores have been written, the first one, which has none, not counted."""
        return len(self._scores.logprobs)

    def append(self, scores: PromptScores) -> None:
        """Take the scores of the next tokens, those behind all that were taken before."""
        own = self._scores
        assert len(scores.top_ids) == self.num_top * len(scores.logprobs), "as many alternatives for each"
        assert self.num_scored + len(scores.logprobs) < len(self), "the prompt's tokens and no more"
        own.logprobs.extend(scores.logprobs)
        own.ranks.extend(scores.ranks)
        own.top_ids.extend(scores.top_ids)
        own.top_logprobs.extend(scores.top_logprobs)

    def __len__(self) -> int:
        return len(self._prompt_token_ids)

    @overload
    def __getitem__(self, index: int) -> TokenLogprob | None: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenLogprob | None]: ...

    def __getitem__(self, index: int | slice) -> TokenLogprob | list[TokenLogprob | None] | None:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        if position == 0:
            return None
        scores, line = self._scores, position - 1
        alternatives = slice(line * self.num_top, (line + 1) * self.num_top)
        return TokenLogprob(
            self._prompt_token_ids[position],
            scores.logprobs[line],
            tuple(zip(scores.top_ids[alternatives], scores.top_logprobs[alternatives], strict=True)),
            scores.ranks[line],
        )


@dataclass(frozen=True, slots=True)
class SequenceDelta:
    """What one step, or the end, adds to one sequence of a request.

    `text` may be empty while characters are incomplete or a stop string may be beginning.
    `token_ids` are those sampled since the last delta, the stop token included.
    `stop_reason` is the stop string or stop token id that matched; None for the end-of-text token.
    `num_cached_tokens` of the request's prompt were in the prefix cache and not computed.
    `prompt_logprobs` comes, whole, with the first delta of sequence 0 of a request that asked for it.
    `pooled` is the answer to a pooling request, [output_size] float32: what the model makes of the prompt's
    hidden states behind its last norm; of a model that generates, that of the last token.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    num_cached_tokens: int = 0
    prompt_logprobs: PromptLogprobs | None = None
    pooled: array[float] | None = None


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
    prompt_logprobs: PromptLogprobs | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """The vector of one prompt: [hidden_size] numbers."""

    embedding: list[float]


@dataclass(frozen=True, slots=True)
class EmbeddingRequestOutput:
    """One embedded prompt (offline API; the shape vLLM users know)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    finished: bool = True


@dataclass(frozen=True, slots=True)
class ScoringOutput:
    """How well a pair of texts goes together."""

    score: float


@dataclass(frozen=True, slots=True)
class ScoringRequestOutput:
    """One scored pair (offline API; the shape vLLM users know)."""

    request_id: str
    outputs: ScoringOutput
    finished: bool = True


@dataclass(frozen=True, slots=True)
class ClassificationOutput:
    """How likely each label of a text is; label: the likeliest."""

    probs: list[float]
    label: str


@dataclass(frozen=True, slots=True)
class ClassificationRequestOutput:
    """One classified text (offline API; the shape vLLM users know)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: ClassificationOutput
    finished: bool = True


def l2_normalized(embedding: array[float]) -> array[float]:
    """The vector of length 1 in the same direction; zeros stay zeros."""
    length = math.hypot(*embedding)
    if length == 0.0:
        return embedding
    return array("f", [value / length for value in embedding])
