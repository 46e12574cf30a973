"""POST /v1/score: how well pairs of texts go together, in vLLM's shape.

Owns the route and its JSON; what a score is, is `generation/scoring.py`'s.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any, Final

from msgspec import Meta

from graphllm.errors import InvalidRequestError
from graphllm.server.generation.admission import Admission
from graphllm.server.generation.decoding import BodyDecoder
from graphllm.server.generation.fields import KnownField
from graphllm.server.generation.pooled_replies import PooledReply
from graphllm.server.generation.pooled_texts import check_number, pair_scores, pooled_truncation
from graphllm.server.generation.served_model import ModelBody, ServedModel
from graphllm.server.http import Request, Response

SCORE_FIELDS: Final[Mapping[str, KnownField]] = {
    "additional_data": KnownField(note="vLLM's extra data has no use here."),
    "encoding_format": KnownField(neutral=("float",), note="Scores are numbers."),
    "mm_processor_kwargs": KnownField(neutral=({},), note="There are no images here."),
    "request_id": KnownField(note="Ids are the server's.", is_tolerated=True),
    "rid": KnownField(note="Ids are the server's.", is_tolerated=True),
}


class PooledBody(ModelBody, kw_only=True):
    """What bodies of scores and labels have in common."""

    use_activation: Annotated[
        bool | None, Meta(description="false gives logits and not what the model's makers make of them.")
    ] = None
    truncate_prompt_tokens: Annotated[
        int | None,
        Meta(description="Keep so many tokens of each input; -1 keeps as many as the context holds."),
    ] = None
    priority: Annotated[int | None, Meta(description="Requests with a lower number run earlier.")] = None
    cache_salt: Annotated[
        str | None, Meta(description="Only requests with the same salt share cached prefixes.")
    ] = None
    user: Annotated[str | None, Meta(description="A label, which changes nothing.")] = None


class ScoreRequest(PooledBody, kw_only=True):
    """The body of POST /v1/score."""

    text_1: Annotated[
        str | list[str], Meta(description="The query, or as many queries as there are texts beside them.")
    ]
    text_2: Annotated[str | list[str], Meta(description="The text, or texts, that are judged.")]
    instruction: Annotated[
        str | None, Meta(description="What to judge by, for models that can be told (Qwen3-Reranker).")
    ] = None


class Scores:
    """Scores each pair, in one engine request each."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._decoder = BodyDecoder(ScoreRequest, SCORE_FIELDS, lenient=served.lenient)

    def create(self, request: Request, response: Response) -> None:
        """Raises GraphLLMError for what is wrong with the body; inputs may fail later."""
        served = self._served
        body = served.decode(request, self._decoder)
        fields, engine = body.fields, served.engine
        check_salt(fields)
        pairs = pair_scores(
            engine,
            _pairs(fields.text_1, fields.text_2),
            truncated=pooled_truncation(engine, fields.truncate_prompt_tokens, None),
            instruction=fields.instruction,
            is_raw=fields.use_activation is False,
            params=("text_1", "text_2"),
        )

        def finish(reply: PooledReply, results: list[Any]) -> dict[str, Any]:
            return {
                "id": reply.id,
                "object": "list",
                "created": int(time.time()),
                "model": reply.model,
                "data": [
                    {"index": index, "object": "score", "score": score}
                    for index, score in enumerate(pairs.scores(results))
                ],
                "usage": reply.usage,
            }

        reply = PooledReply(
            served,
            model=fields.model,
            prefix="score",
            take=lambda position, result: result,
            finish=finish,
            param="text_2",
            warnings=body.warnings,
            request=request,
            response=response,
            cache_salt=fields.cache_salt,
            priority=fields.priority,
        )
        Admission(pairs.inputs(), reply.submit, request=request, response=response).proceed()


def check_salt(fields: PooledBody) -> None:
    """Raises InvalidRequestError for an empty one."""
    if fields.cache_salt == "":
        raise InvalidRequestError("'cache_salt' must not be empty.", param="cache_salt")


def _pairs(first: str | list[str], second: str | list[str]) -> list[tuple[str, str]]:
    """One query with each text, or each with its own. Raises InvalidRequestError."""
    queries, texts = ([value] if isinstance(value, str) else value for value in (first, second))
    for name, values in (("text_1", queries), ("text_2", texts)):
        if not values:
            raise InvalidRequestError(f"'{name}' must not be an empty array.", param=name)
        check_number(values, name)
    if len(queries) == 1:
        queries = queries * len(texts)
    if len(queries) != len(texts):
        raise InvalidRequestError(
            f"'text_1' has {len(queries)} entries and 'text_2' {len(texts)}; send one query, or one for each "
            "text.",
            param="text_1",
        )
    return [*zip(queries, texts, strict=True)]
