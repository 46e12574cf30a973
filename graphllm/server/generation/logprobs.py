"""Log probabilities in the two shapes of the OpenAI API, and vLLM's shape for those of a prompt.

Every sampled token has an entry, the end-of-text token and the tokens of a stop string included, so
that there are as many entries as completion tokens. A token that is not whole text by itself (half
an emoji) is shown as `bytes:\\xf0\\x9f`, as OpenAI does.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any

from graphllm.outputs import TokenLogprob
from graphllm.tokenizer.tokenizer import Tokenizer

# OpenAI's stand-in for "very unlikely"; JSON has no -inf.
MIN_LOGPROB = -9999.0

TokenScore = TokenLogprob | int
"""A token with its log probability, or the id of one that has none: the first of a prompt."""


def token_label(tokenizer: Tokenizer, token_id: int, *, as_id: bool = False) -> str:
    """The token as text, or its bytes spelt out where they are no text; `token_id:N` where asked for."""
    if as_id:
        return f"token_id:{token_id}"
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(
    tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob], *, tokens_as_ids: bool = False
) -> list[dict[str, Any]]:
    """Entries of `choices[i].logprobs.content` of a chat completion."""
    return [
        {
            **_chat_entry(tokenizer, (entry.token_id, entry.logprob), as_id=tokens_as_ids),
            "top_logprobs": [_chat_entry(tokenizer, pair, as_id=tokens_as_ids) for pair in entry.top],
        }
        for entry in logprobs
    ]


def prompt_logprobs_entry(tokenizer: Tokenizer, score: TokenLogprob | None) -> dict[str, Any] | None:
    """One prompt token's entry in vLLM's `prompt_logprobs`: the likeliest tokens and the one that came."""
    if score is None:
        return None
    ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(score.top, start=1)]
    if all(token_id != score.token_id for token_id, _ in score.top):
        ranked.append((score.token_id, score.logprob, score.rank or 0))
    return {
        str(token_id): {
            "logprob": max(logprob, MIN_LOGPROB),
            "rank": rank,
            "decoded_token": tokenizer.token_text(token_id),
        }
        for token_id, logprob, rank in ranked
    }


def _chat_entry(tokenizer: Tokenizer, pair: tuple[int, float], *, as_id: bool) -> dict[str, Any]:
    token_id, logprob = pair
    return {
        "token": token_label(tokenizer, token_id, as_id=as_id),
        "logprob": max(logprob, MIN_LOGPROB),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


class CompletionLogprobs:
    """`choices[i].logprobs` of a text completion, for one choice, a few tokens at a time.

    `text_offset` is where a token's first whole character starts in the choice's text, counted in
    characters.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool, tokens_as_ids: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._tokens_as_ids = tokens_as_ids
        self._silent_ids = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def format(self, scores: Iterable[TokenScore]) -> dict[str, Any]:
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for score in scores:
            token_id = score if isinstance(score, int) else score.token_id
            tokens.append(self._label(token_id))
            if isinstance(score, int):
                values.append(None)
                tops.append(None)
            else:
                value = max(score.logprob, MIN_LOGPROB)
                values.append(value)
                # The sampled token is always listed, as OpenAI documents.
                top = {self._label(other): max(logprob, MIN_LOGPROB) for other, logprob in score.top}
                top.setdefault(tokens[-1], value)
                tops.append(top)
            offsets.append(self._offset)
            if token_id not in self._silent_ids:
                self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _label(self, token_id: int) -> str:
        return token_label(self._tokenizer, token_id, as_id=self._tokens_as_ids)
