"""POST /v1/classify: how likely each of a model's labels is, for each input, in vLLM's shape.

Owns the route and its JSON. Reward models, whose one label is no probability, are asked here too, with
`use_activation` false.
"""

from __future__ import annotations

import time
from array import array
from typing import Annotated, Any

from msgspec import Meta

from graphllm.errors import InvalidRequestError
from graphllm.models.pooled_texts import activated
from graphllm.server.generation.admission import Admission
from graphllm.server.generation.decoding import BodyDecoder
from graphllm.server.generation.pooled_replies import PooledReply
from graphllm.server.generation.pooled_texts import pooled_inputs, pooled_truncation, text_encoder
from graphllm.server.generation.served_model import ServedModel
from graphllm.server.http import Request, Response
from graphllm.server.openai.scores import SCORE_FIELDS, PooledBody, check_salt

CLASSIFY_FIELDS = SCORE_FIELDS


class ClassifyRequest(PooledBody, kw_only=True):
    """The body of POST /v1/classify."""

    input: Annotated[
        str | list[str | int | list[int]],
        Meta(description="A text, a list of texts, a list of token ids, or a list of such lists."),
    ]
    add_special_tokens: Annotated[
        bool | None, Meta(description="false leaves out what the tokenizer puts around texts.")
    ] = None


class Classification:
    """Classifies each input, in one engine request each."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._decoder = BodyDecoder(ClassifyRequest, CLASSIFY_FIELDS, lenient=served.lenient)

    def create(self, request: Request, response: Response) -> None:
        """Raises GraphLLMError for what is wrong with the body; inputs may fail later."""
        served = self._served
        body = served.decode(request, self._decoder)
        fields, engine = body.fields, served.engine
        pooling = engine.pooling
        if not pooling.labels:
            raise InvalidRequestError(
                "This model has no labels; it was published for "
                f"{'embeddings' if pooling.purpose == 'embed' else 'generating text'}.",
                param="model",
            )
        check_salt(fields)

        def take(position: int, logits: array[float]) -> dict[str, Any]:
            probabilities = activated(logits, pooling, is_raw=fields.use_activation is False)
            best = max(range(len(probabilities)), key=probabilities.__getitem__)
            return {
                "index": position,
                "label": pooling.labels[best],
                "probs": probabilities,
                "num_classes": len(probabilities),
            }

        def finish(reply: PooledReply, entries: list[Any]) -> dict[str, Any]:
            return {
                "id": reply.id,
                "object": "list",
                "created": int(time.time()),
                "model": reply.model,
                "data": entries,
                "usage": reply.usage,
            }

        reply = PooledReply(
            served,
            model=fields.model,
            prefix="classify",
            take=take,
            finish=finish,
            param="input",
            warnings=body.warnings,
            request=request,
            response=response,
            cache_salt=fields.cache_salt,
            priority=fields.priority,
        )
        encoder = text_encoder(
            engine,
            pooled_truncation(engine, fields.truncate_prompt_tokens, None),
            add_special_tokens=fields.add_special_tokens is not False,
        )
        inputs = pooled_inputs(fields.input, engine, encoder=encoder)
        Admission(inputs, reply.submit, request=request, response=response).proceed()
