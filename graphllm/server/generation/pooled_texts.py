"""The texts and token ids of a request for vectors or scores, one at a time.

Owns what such a request may look like. What a text becomes is `models/pooled_texts.py`'s, whether it fits the
engine's to judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from graphllm.engine.engine import Engine
from graphllm.errors import InvalidRequestError
from graphllm.models.pair_scores import PairScores
from graphllm.models.pooled_texts import TextEncoder
from graphllm.server.generation.prompts import MAX_PROMPTS, Truncation, checked_token_ids, truncation

Input = str | list[str | int | list[int]]


def text_encoder(
    engine: Engine,
    truncated: Truncation | None,
    *,
    prompt: str = "",
    add_special_tokens: bool = True,
    param: str = "input",
) -> TextEncoder:
    """How a request's texts become ids; truncated: as `pooled_truncation` gives it."""
    return TextEncoder(
        tokenizer=engine.tokenizer,
        pooling=engine.pooling,
        max_tokens=engine.max_model_len if truncated is None else truncated.num_kept,
        is_cut=truncated is not None,
        keeps_first=truncated is None or truncated.keeps_first,
        prompt=prompt,
        add_special_tokens=add_special_tokens,
        param=param,
    )


def pair_scores(
    engine: Engine,
    pairs: Sequence[tuple[str, str]],
    *,
    truncated: Truncation | None,
    instruction: str | None,
    is_raw: bool,
    params: tuple[str, str],
) -> PairScores:
    """A request's pairs. Raises InvalidRequestError where the model cannot score them so."""
    return PairScores(
        engine.tokenizer,
        engine.pooling,
        pairs,
        max_tokens=engine.max_model_len if truncated is None else truncated.num_kept,
        is_cut=truncated is not None,
        instruction=instruction,
        is_raw=is_raw,
        params=params,
    )


def pooled_inputs(value: Input, engine: Engine, *, encoder: TextEncoder) -> Iterator[list[int]]:
    """The ids of one text or id list, or of a list of either, one at a time.

    Raises InvalidRequestError and ContextLengthError when it gets there.
    """
    name = encoder.param
    if isinstance(value, str):
        yield encoder.ids(value)
        return
    if not value:
        raise InvalidRequestError(f"'{name}' must not be an empty array.", param=name)
    if isinstance(value[0], int):
        yield _checked(value, engine, encoder=encoder, path=name)
        return
    check_number(value, name)
    kind = type(value[0])
    for position, entry in enumerate(value):
        path = f"{name}[{position}]"
        if type(entry) is not kind:
            raise InvalidRequestError(
                f"'{path}': inputs must all be texts or all be arrays of token ids.", param=name
            )
        if isinstance(entry, str):
            yield encoder.ids(entry)
        else:
            assert isinstance(entry, list)
            yield _checked(entry, engine, encoder=encoder, path=path)


def _checked(
    ids: Sequence[str | int | list[int]], engine: Engine, *, encoder: TextEncoder, path: str
) -> list[int]:
    if encoder.is_cut:
        kept = encoder.max_tokens
        ids = ids[:kept] if encoder.keeps_first else ids[-kept:]
    try:
        return checked_token_ids([*ids], engine.tokenizer, path=path, max_model_len=engine.max_model_len)
    except InvalidRequestError as error:
        error.param = encoder.param
        raise


def check_number(values: Sequence[object], name: str) -> None:
    """Raises InvalidRequestError for more texts than one request may bring."""
    if len(values) > MAX_PROMPTS:
        raise InvalidRequestError(
            f"'{name}' has {len(values)} entries; at most {MAX_PROMPTS} are allowed.", param=name
        )


def pooled_truncation(engine: Engine, num_kept: int | None, side: str | None) -> Truncation | None:
    """What `truncate_prompt_tokens` and `truncation_side` ask; models for vectors and scores lose the end.

    Raises InvalidRequestError.
    """
    if num_kept is not None and side is None and engine.pooling.purpose != "generate":
        side = "right"
    return truncation(num_kept, side, max_model_len=engine.max_model_len, max_tokens=0)
