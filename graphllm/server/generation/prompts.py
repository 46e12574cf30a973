"""From the `prompt` of a text completion to token ids, one list for each prompt of the batch.

Owns what a prompt may look like. The tokenizer bounds its own work by the context; whether tokens
fit beside the requested output is the engine's to judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from graphllm.errors import ContextLengthError, InvalidRequestError
from graphllm.tokenizer.tokenizer import Tokenizer

# Each prompt of a batch is an engine request; more belong in more HTTP requests.
MAX_PROMPTS = 1024
# Few real texts have more; those that do are looked at again, four times as much of them.
_CHARS_PER_KEPT_TOKEN = 8
# Tokens near the place where a text is cut that may be others than in the whole.
_CUT_MARGIN = 64


@dataclass(frozen=True, slots=True)
class Truncation:
    """Keep `num_kept` tokens of a prompt that has more: its last ones, or with `keeps_first` its first."""

    num_kept: int
    keeps_first: bool = False


def truncation(
    num_kept: int | None, side: str | None, *, max_model_len: int, max_tokens: int
) -> Truncation | None:
    """What `truncate_prompt_tokens` (-1: what the context holds beside the output) and `truncation_side` ask.

    side: "left" (or None) drops the beginning, "right" the end. Raises InvalidRequestError.
    """
    if side not in (None, "left", "right"):
        raise InvalidRequestError(
            f"'truncation_side' must be left or right, not {side[:40]!r}.", param="truncation_side"
        )
    if num_kept is None:
        if side is not None:
            raise InvalidRequestError(
                "'truncation_side' is only allowed with truncate_prompt_tokens.", param="truncation_side"
            )
        return None
    if num_kept != -1 and not 1 <= num_kept <= max_model_len:
        raise InvalidRequestError(
            f"'truncate_prompt_tokens' must be -1 or between 1 and {max_model_len}, not {num_kept}.",
            param="truncate_prompt_tokens",
        )
    return Truncation(max(1, max_model_len - max_tokens) if num_kept == -1 else num_kept, side == "right")


def encoded_prompts(
    prompt: str | list[str | int | list[int]],
    tokenizer: Tokenizer,
    *,
    max_model_len: int,
    truncated: Truncation | None = None,
    add_special_tokens: bool = True,
) -> Iterator[list[int]]:
    """The id lists of one text or id list, or of a list of either, one at a time.

    Raises InvalidRequestError and ContextLengthError, whose `param` is "prompt", when it gets there.
    """
    encoder = _Encoder(tokenizer, max_model_len, truncated, add_special_tokens)
    if isinstance(prompt, str):
        yield encoder.text_ids(prompt, "prompt")
        return
    if not prompt:
        raise _refusal("'prompt' must not be an empty array.")
    if isinstance(prompt[0], int):
        yield encoder.checked_ids(prompt, "prompt")
        return
    if len(prompt) > MAX_PROMPTS:
        raise _refusal(f"'prompt' has {len(prompt)} entries; at most {MAX_PROMPTS} are allowed.")
    kind = type(prompt[0])
    for position, entry in enumerate(prompt):
        path = f"prompt[{position}]"
        if type(entry) is not kind:
            raise _refusal(f"'{path}': prompts must all be texts or all be arrays of token ids.")
        if isinstance(entry, str):
            yield encoder.text_ids(entry, path)
        else:
            assert isinstance(entry, list)
            yield encoder.checked_ids(entry, path)


@dataclass(frozen=True, slots=True)
class _Encoder:
    """How the prompts of one request become ids."""

    tokenizer: Tokenizer
    max_model_len: int
    truncated: Truncation | None
    add_special_tokens: bool

    def text_ids(self, text: str, path: str) -> list[int]:
        if self.truncated is not None:
            token_ids = encode_truncated(
                text, self.tokenizer, truncated=self.truncated, add_special_tokens=self.add_special_tokens
            )
        else:
            token_ids = self.tokenizer.encode(
                text,
                add_special_tokens=self.add_special_tokens,
                max_tokens=self.max_model_len,
                param="prompt",
            )
        if not token_ids:
            raise _refusal(f"'{path}' is empty; the model needs at least one token.")
        return token_ids

    def checked_ids(self, ids: Sequence[int] | list[str | int | list[int]], path: str) -> list[int]:
        if self.truncated is not None:
            kept = self.truncated.num_kept
            ids = ids[:kept] if self.truncated.keeps_first else ids[-kept:]
        return checked_token_ids(ids, self.tokenizer, path=path, max_model_len=self.max_model_len)


def encode_truncated(
    text: str, tokenizer: Tokenizer, *, truncated: Truncation, add_special_tokens: bool, param: str = "prompt"
) -> list[int]:
    """The ids of a text, or of its end (or beginning) where it has more; the work is bounded by their number.

    A text that is far longer is cut well beyond the kept tokens before it is tokenized, which changes tokens
    near that cut only. Raises InvalidRequestError for what is no Unicode text.
    """
    num_kept, keeps_first = truncated.num_kept, truncated.keeps_first
    num_chars = _CHARS_PER_KEPT_TOKEN * (num_kept + _CUT_MARGIN)
    while True:
        is_whole = num_chars >= len(text)
        part = text if is_whole else text[:num_chars] if keeps_first else text[-num_chars:]
        token_ids = tokenizer.encode(part, add_special_tokens=add_special_tokens, param=param)
        if is_whole or len(token_ids) >= num_kept + _CUT_MARGIN:
            return token_ids[:num_kept] if keeps_first else token_ids[-num_kept:]
        num_chars *= 4


def checked_token_ids(
    ids: Sequence[int] | list[str | int | list[int]],
    tokenizer: Tokenizer,
    *,
    path: str,
    max_model_len: int,
) -> list[int]:
    """The ids of `path`, all of the vocabulary and no more than the context. Raises InvalidRequestError."""
    if not ids:
        raise _refusal(f"'{path}' is empty; the model needs at least one token.")
    if len(ids) > max_model_len:
        raise ContextLengthError(
            f"The model's context is {max_model_len} tokens, but '{path}' has {len(ids)} tokens.",
            param="prompt",
        )
    vocab_size = tokenizer.vocab_size
    token_ids: list[int] = []
    for position, token_id in enumerate(ids):
        if not isinstance(token_id, int):
            raise _refusal(f"'{path}[{position}]' must be a token id like the entries before it.")
        if not 0 <= token_id < vocab_size:
            raise _refusal(
                f"'{path}[{position}]' is {token_id}, but the model has token ids 0 to {vocab_size - 1}."
            )
        token_ids.append(token_id)
    return token_ids


def _refusal(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, param="prompt")
