"""Log probabilities in the two shapes of the OpenAI API.

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


def token_label(tokenizer: Tokenizer, token_id: int) -> str:
    """The token as text, or its bytes spelt out where they are no text."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """Entries of `choices[i].logprobs.content` of a chat completion."""
    return [
        {
            **_chat_entry(tokenizer, (entry.token_id, entry.logprob)),
            "top_logprobs": [_chat_entry(tokenizer, pair) for pair in entry.top],
        }
        for entry in logprobs
    ]


def _chat_entry(tokenizer: Tokenizer, pair: tuple[int, float]) -> dict[str, Any]:
    token_id, logprob = pair
    return {
        "token": token_label(tokenizer, token_id),
        "logprob": max(logprob, MIN_LOGPROB),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


class CompletionLogprobs:
    """`choices[i].logprobs` of a text completion, for one choice, a few tokens at a time.

    `text_offset` is where a token's first whole character starts in the choice's text, counted in
    characters.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._silent_ids = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def format(self, logprobs: Iterable[TokenLogprob]) -> dict[str, Any]:
        tokens: list[str] = []
        values: list[float] = []
        tops: list[dict[str, float]] = []
        offsets: list[int] = []
        for entry in logprobs:
            tokens.append(token_label(self._tokenizer, entry.token_id))
            values.append(max(entry.logprob, MIN_LOGPROB))
            # The sampled token is always listed, as OpenAI documents.
            top = {
                token_label(self._tokenizer, token_id): max(value, MIN_LOGPROB)
                for token_id, value in entry.top
            }
            top.setdefault(tokens[-1], values[-1])
            tops.append(top)
            offsets.append(self._offset)
            if entry.token_id not in self._silent_ids:
                self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(entry.token_id)))
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
