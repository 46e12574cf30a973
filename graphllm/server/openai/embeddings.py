"""POST /v1/embeddings: one vector for each input.

Owns the route and its JSON. What a vector is, and which prompt stands in front of a text, is what the model
was published with. Decoders that were not trained for it give the hidden state of the last token, brought to
length 1: vectors of modest use, given all the same, because that is what was asked for.
"""

from __future__ import annotations

import base64
import logging
from array import array
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal

import orjson
from msgspec import Meta

from graphllm.errors import InvalidRequestError
from graphllm.models.pooled_texts import find_prompt
from graphllm.models.pooling import PoolingConfig
from graphllm.outputs import l2_normalized
from graphllm.server.generation.admission import Admission
from graphllm.server.generation.decoding import BodyDecoder
from graphllm.server.generation.fields import KnownField
from graphllm.server.generation.pooled_replies import PooledReply
from graphllm.server.generation.pooled_texts import pooled_inputs, pooled_truncation, text_encoder
from graphllm.server.generation.served_model import ModelBody, ServedModel
from graphllm.server.http import Request, Response

logger = logging.getLogger(__name__)

EMBEDDING_FIELDS: Final[Mapping[str, KnownField]] = {
    "additional_data": KnownField(note="vLLM's extra data has no use here."),
    "embed_dtype": KnownField(neutral=("float32",), note="Vectors are float32."),
    "embed_override_token_id": KnownField(note="Inputs are texts or token ids."),
    "embed_overrides": KnownField(note="Inputs are texts or token ids."),
    "endianness": KnownField(neutral=("native", "little"), note="base64 holds little-endian numbers."),
    "lora_path": KnownField(note="Name a loaded adapter as `model`."),
    "messages": KnownField(note="Send `input`; chats are not embedded."),
    "mm_processor_kwargs": KnownField(neutral=({},), note="There are no images here."),
    "request_id": KnownField(note="Ids are the server's.", is_tolerated=True),
    "rid": KnownField(note="Ids are the server's.", is_tolerated=True),
    "use_activation": KnownField(neutral=(True,), note="Send `normalize`."),
}


class EmbeddingRequest(ModelBody, kw_only=True):
    """The body of POST /v1/embeddings."""

    input: Annotated[
        str | list[str | int | list[int]],
        Meta(description="A text, a list of texts, a list of token ids, or a list of such lists."),
    ]
    encoding_format: Annotated[
        Literal["float", "base64"] | None,
        Meta(description="Vectors as JSON numbers (float) or as base64 of little-endian float32 (base64)."),
    ] = None
    dimensions: Annotated[
        int | None,
        Meta(description="Only the first numbers of each vector, for models that were trained for it."),
    ] = None
    prompt_name: Annotated[
        str | None, Meta(description="Which of the model's published prompts goes in front of each text.")
    ] = None
    input_type: Annotated[
        str | None, Meta(description="What the texts are: query, or document (passage), for the same.")
    ] = None
    normalize: Annotated[
        bool | None, Meta(description="Vectors of length 1 or as they are; by default as published.")
    ] = None
    add_special_tokens: Annotated[
        bool | None, Meta(description="false leaves out what the tokenizer puts around texts.")
    ] = None
    truncate_prompt_tokens: Annotated[
        int | None,
        Meta(description="Keep so many tokens of each input; -1 keeps as many as the context holds."),
    ] = None
    truncation_side: Annotated[
        str | None,
        Meta(description="left drops the beginning of a long input, right its end, as by default."),
    ] = None
    priority: Annotated[int | None, Meta(description="Requests with a lower number run earlier.")] = None
    cache_salt: Annotated[
        str | None, Meta(description="Only requests with the same salt share cached prefixes.")
    ] = None
    user: Annotated[str | None, Meta(description="A label, logged at debug level.")] = None


class Embeddings:
    """Embeds each input, in one engine request each."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._decoder = BodyDecoder(EmbeddingRequest, EMBEDDING_FIELDS, lenient=served.lenient)

    def create(self, request: Request, response: Response) -> None:
        """Raises GraphLLMError for what is wrong with the body; inputs may fail later."""
        served = self._served
        body = served.decode(request, self._decoder)
        fields, pooling = body.fields, served.engine.pooling
        if pooling.purpose == "score":
            raise InvalidRequestError(
                "This model is for scores and gives no vectors; use /v1/score, /v1/rerank or /v1/classify.",
                param="model",
            )
        if fields.cache_salt == "":
            raise InvalidRequestError("'cache_salt' must not be empty.", param="cache_salt")
        check_dimensions(fields.dimensions, pooling)
        reply = PooledReply(
            served,
            model=fields.model,
            prefix="embd",
            take=_Vectors(fields, pooling).take,
            finish=self._body,
            param="input",
            warnings=body.warnings,
            request=request,
            response=response,
            cache_salt=fields.cache_salt,
            priority=fields.priority,
        )
        if fields.user is not None:
            logger.debug("request %s has the labels %s", reply.id, {"user": fields.user})
        Admission(self._token_ids(fields), reply.submit, request=request, response=response).proceed()

    def _token_ids(self, fields: EmbeddingRequest) -> Iterator[list[int]]:
        """Raises InvalidRequestError."""
        engine = self._served.engine
        prompt = find_prompt(engine.pooling, fields.prompt_name, fields.input_type)
        asks_for_prompt = fields.prompt_name is not None or fields.input_type is not None
        has_ids = isinstance(fields.input, list) and not isinstance(next(iter(fields.input), ""), str)
        if asks_for_prompt and has_ids:
            name = "input_type" if fields.prompt_name is None else "prompt_name"
            raise InvalidRequestError(
                f"'{name}' puts a prompt in front of texts, not of token ids.", param=name
            )
        encoder = text_encoder(
            engine,
            pooled_truncation(engine, fields.truncate_prompt_tokens, fields.truncation_side),
            prompt=prompt,
            add_special_tokens=fields.add_special_tokens is not False,
        )
        yield from pooled_inputs(fields.input, engine, encoder=encoder)

    def _body(self, reply: PooledReply, vectors: list[Any]) -> dict[str, Any]:
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": vector}
                for index, vector in enumerate(vectors)
            ],
            "model": reply.model,
            "usage": reply.usage,
        }


class _Vectors:
    """How one request wants its vectors."""

    def __init__(self, fields: EmbeddingRequest, pooling: PoolingConfig) -> None:
        self._dimensions = fields.dimensions
        self._normalizes = pooling.normalizes if fields.normalize is None else fields.normalize
        self._is_base64 = fields.encoding_format == "base64"

    def take(self, position: int, vector: array[float]) -> orjson.Fragment:
        """A vector as JSON. One that is cut short has its length anew."""
        vector = vector[: self._dimensions]
        if self._normalizes:
            vector = l2_normalized(vector)
        if self._is_base64:
            return orjson.Fragment(orjson.dumps(base64.b64encode(vector.tobytes()).decode()))
        return orjson.Fragment(orjson.dumps(vector.tolist()))


def check_dimensions(dimensions: int | None, pooling: PoolingConfig) -> None:
    """Raises InvalidRequestError for a size that the model's makers do not name."""
    size = pooling.output_size
    if dimensions is None or dimensions == size:
        return
    if not pooling.can_be_cut:
        raise InvalidRequestError(
            f"'dimensions': this model's vectors have {size} numbers; its config.json does not say that they "
            "may be cut short, nor does --matryoshka-dimensions.",
            param="dimensions",
        )
    if pooling.sizes and dimensions not in pooling.sizes:
        sizes = ", ".join(map(str, pooling.sizes))
        raise InvalidRequestError(
            f"'dimensions' must be one of {sizes}, not {dimensions}.", param="dimensions"
        )
    if not 1 <= dimensions <= size:
        raise InvalidRequestError(
            f"'dimensions' must be between 1 and {size}, not {dimensions}.", param="dimensions"
        )
