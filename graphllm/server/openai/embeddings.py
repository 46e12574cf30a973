"""POST /v1/embeddings: one vector for each input, from whatever decoder is served.

Owns the route and its JSON. A vector is the hidden state of an input's last token after the model's final
norm, brought to length 1. Decoders that were not trained for it give vectors of modest use; they are given
all the same, because that is what was asked for.
"""

from __future__ import annotations

import base64
import logging
from array import array
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal
from uuid import uuid4

import orjson
from msgspec import Meta

from graphllm.errors import EngineUnavailableError, GraphLLMError, InvalidRequestError
from graphllm.outputs import FinishReason, SequenceDelta, l2_normalized
from graphllm.sampling_params import SamplingParams
from graphllm.server.error_responses import send_error
from graphllm.server.generation.admission import Admission
from graphllm.server.generation.decoding import BodyDecoder
from graphllm.server.generation.fields import KnownField
from graphllm.server.generation.prompts import encoded_prompts, truncation
from graphllm.server.generation.request import RequestWarning
from graphllm.server.generation.served_model import ModelBody, ServedModel
from graphllm.server.http import Request, Response

logger = logging.getLogger(__name__)

_PARAMS = SamplingParams(max_tokens=0)

EMBEDDING_FIELDS: Final[Mapping[str, KnownField]] = {
    "additional_data": KnownField(note="vLLM's extra data has no use here."),
    "dimensions": KnownField(note="Vectors have the model's own size; it was not trained to be cut short."),
    "embed_dtype": KnownField(neutral=("float32",), note="Vectors are float32."),
    "embed_override_token_id": KnownField(note="Inputs are texts or token ids."),
    "embed_overrides": KnownField(note="Inputs are texts or token ids."),
    "endianness": KnownField(neutral=("native", "little"), note="base64 holds little-endian numbers."),
    "lora_path": KnownField(note="There are no adapters; the model is served as it is."),
    "messages": KnownField(note="Send `input`; chats are not embedded."),
    "mm_processor_kwargs": KnownField(neutral=({},), note="There are no images here."),
    "normalize": KnownField(neutral=(True,), note="Vectors have length 1."),
    "request_id": KnownField(note="Ids are the server's.", is_tolerated=True),
    "rid": KnownField(note="Ids are the server's.", is_tolerated=True),
    "use_activation": KnownField(neutral=(True,), note="Vectors have length 1."),
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
    add_special_tokens: Annotated[
        bool | None, Meta(description="false leaves out what the tokenizer puts around texts.")
    ] = None
    truncate_prompt_tokens: Annotated[
        int | None,
        Meta(description="Keep so many of each input's last tokens; -1 keeps as many as the context holds."),
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
        fields = body.fields
        if fields.cache_salt == "":
            raise InvalidRequestError("'cache_salt' must not be empty.", param="cache_salt")
        reply = _EmbeddingReply(served, fields, warnings=body.warnings, request=request, response=response)
        if fields.user is not None:
            logger.debug("request %s has the labels %s", reply.id, {"user": fields.user})
        Admission(self._token_ids(fields), reply.submit, request=request, response=response).proceed()

    def _token_ids(self, fields: EmbeddingRequest) -> Iterator[list[int]]:
        """Raises InvalidRequestError, its `param` in the words of the body."""
        engine = self._served.engine
        limit = engine.max_model_len
        try:
            yield from encoded_prompts(
                fields.input,
                engine.tokenizer,
                max_model_len=limit,
                truncated=truncation(fields.truncate_prompt_tokens, None, max_model_len=limit, max_tokens=0),
                add_special_tokens=fields.add_special_tokens is not False,
            )
        except InvalidRequestError as error:
            raise _in_client_terms(error) from None


class _EmbeddingReply:
    """The inputs' sinks and the answer they make together."""

    def __init__(
        self,
        served: ServedModel,
        fields: EmbeddingRequest,
        *,
        warnings: tuple[RequestWarning, ...],
        request: Request,
        response: Response,
    ) -> None:
        self._served = served
        self._fields = fields
        self._warnings = warnings
        self._request = request
        self._response = response
        self.id = f"embd-{uuid4().hex}"
        self._request_ids: list[str] = []
        self._vectors: list[orjson.Fragment | None] = []
        self._num_prompt_tokens = 0
        self._num_missing = 0
        self._is_open = True

    def submit(self, inputs: list[list[int]]) -> None:
        """Hand every input to the engine, or none: raises what `Engine.add` raises."""
        self._request.on_disconnect = self._abandon
        self._vectors = [None] * len(inputs)
        self._num_missing = len(inputs)
        self._num_prompt_tokens = sum(map(len, inputs))
        for position, token_ids in enumerate(inputs):
            request_id = f"{self.id}-{position}"
            try:
                self._served.engine.add(
                    request_id,
                    token_ids,
                    params=_PARAMS,
                    sink=_InputSink(self, position),
                    cache_salt=self._fields.cache_salt,
                    priority=self._fields.priority or 0,
                    pooling=True,
                )
            except GraphLLMError as error:
                self._abandon()
                raise _in_client_terms(error) from None
            self._request_ids.append(request_id)

    def take(self, position: int, vector: array[float]) -> None:
        """An input's hidden state. It becomes JSON now, because a whole batch at the end would take long."""
        vector = l2_normalized(vector)
        if self._fields.encoding_format == "base64":
            encoded = orjson.dumps(base64.b64encode(vector.tobytes()).decode())
        else:
            encoded = orjson.dumps(vector.tolist())
        self._vectors[position] = orjson.Fragment(encoded)

    def finish_input(self) -> None:
        self._num_missing -= 1
        if self._num_missing == 0 and self._is_open:
            self._is_open = False
            headers = (("x-request-id", self.id),)
            self._response.send(200, orjson.dumps(self._body()), headers=headers)

    def fail(self, error: GraphLLMError) -> None:
        if self._is_open:
            self._abandon()
            send_error(self._response, error)

    def _abandon(self) -> None:
        if self._is_open:
            self._is_open = False
            for request_id in self._request_ids:
                self._served.engine.abort(request_id)

    def _body(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": vector}
                for index, vector in enumerate(self._vectors)
            ],
            "model": self._served.name,
            "usage": {"prompt_tokens": self._num_prompt_tokens, "total_tokens": self._num_prompt_tokens},
        }
        if self._warnings:
            body["warnings"] = [warning.as_json() for warning in self._warnings]
        return body


class _InputSink:
    """The engine's view of one input."""

    __slots__ = ("_position", "_reply")

    def __init__(self, reply: _EmbeddingReply, position: int) -> None:
        self._reply = reply
        self._position = position

    def write(self, delta: SequenceDelta) -> None:
        if delta.finish_reason is FinishReason.ABORT:
            self._reply.fail(EngineUnavailableError("The request was cut short by the server."))
        elif delta.pooled is not None:
            self._reply.take(self._position, delta.pooled)

    def flush(self) -> None:
        """Nothing leaves before the end."""

    def finish(self) -> None:
        self._reply.finish_input()

    def fail(self, error: GraphLLMError) -> None:
        self._reply.fail(error)


def _in_client_terms(error: GraphLLMError) -> GraphLLMError:
    if error.param == "prompt":
        error.param = "input"
        error.message = error.message.replace("'prompt", "'input")
    return error
