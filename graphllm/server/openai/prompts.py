"""From the `prompt` of a text completion to token ids, one list for each prompt of the batch.

Owns what a prompt may look like. The tokenizer bounds its own work by the context; whether tokens
fit beside the requested output is the engine's to judge.
"""

from __future__ import annotations

from collections.abc import Iterator

from graphllm.errors import ContextLengthError, InvalidRequestError
from graphllm.tokenizer.tokenizer import Tokenizer

# Each prompt of a batch is an engine request; more belong in more HTTP requests.
MAX_PROMPTS = 1024


def encoded_prompts(
    prompt: str | list[str | int | list[int]], tokenizer: Tokenizer, *, max_model_len: int
) -> Iterator[list[int]]:
    """The id lists of one text or id list, or of a list of either, one at a time.

    Raises InvalidRequestError and ContextLengthError, whose `param` is "prompt", when it gets there.
    """
    if isinstance(prompt, str):
        yield _text_ids(prompt, tokenizer, path="prompt", max_model_len=max_model_len)
        return
    if not prompt:
        raise _refusal("'prompt' must not be an empty array.")
    if isinstance(prompt[0], int):
        yield _checked_ids(prompt, tokenizer, path="prompt", max_model_len=max_model_len)
        return
    if len(prompt) > MAX_PROMPTS:
        raise _refusal(f"'prompt' has {len(prompt)} entries; at most {MAX_PROMPTS} are allowed.")
    kind = type(prompt[0])
    for position, entry in enumerate(prompt):
        path = f"prompt[{position}]"
        if type(entry) is not kind:
            raise _refusal(f"'{path}': prompts must all be texts or all be arrays of token ids.")
        if isinstance(entry, str):
            yield _text_ids(entry, tokenizer, path=path, max_model_len=max_model_len)
        else:
            assert isinstance(entry, list)
            yield _checked_ids(entry, tokenizer, path=path, max_model_len=max_model_len)


def _text_ids(text: str, tokenizer: Tokenizer, *, path: str, max_model_len: int) -> list[int]:
    token_ids = tokenizer.encode(text, max_tokens=max_model_len, param="prompt")
    if not token_ids:
        raise _refusal(f"'{path}' is empty; the model needs at least one token.")
    return token_ids


def _checked_ids(
    ids: list[int] | list[str | int | list[int]], tokenizer: Tokenizer, *, path: str, max_model_len: int
) -> list[int]:
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
