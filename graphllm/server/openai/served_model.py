"""The one model behind the /v1 routes, as its endpoints see it.

Owns the model's id in the API and the checks that every endpoint shares: the engine can serve, the
body is JSON, the model is this one.
"""

from __future__ import annotations

import time
from typing import TypeVar

from graphllm.engine.engine import Engine
from graphllm.errors import InvalidRequestError, ModelNotFoundError
from graphllm.sampling_params import SamplingParams
from graphllm.server.http import Request, Response
from graphllm.server.openai.decoding import BodyDecoder
from graphllm.server.openai.protocol import SamplingFields
from graphllm.server.openai.replies import StreamedReply, WholeReply
from graphllm.server.openai.wire import Wire

RequestType = TypeVar("RequestType", bound=SamplingFields)


class ServedModel:
    """name: the id clients use. created: seconds since 1970 when this process took it up."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name
        self.created = int(time.time())

    def check_name(self, name: str) -> None:
        """Raises ModelNotFoundError for any other model."""
        if name != self.name:
            raise ModelNotFoundError(
                f"The model '{name[:200]}' does not exist; this server serves '{self.name}'.", param="model"
            )

    def decode(self, request: Request, decoder: BodyDecoder[RequestType]) -> RequestType:
        """The checked body. Raises EngineUnavailableError, InvalidRequestError, ModelNotFoundError."""
        self.engine.check_ready()
        check_content_type(request)
        body = decoder.decode(request.body)
        self.check_name(body.model)
        return body

    def submit(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        wire: Wire,
        fields: SamplingFields,
        request: Request,
        response: Response,
    ) -> None:
        """Generate for every prompt and answer as the request asked. Raises what `Engine.add` raises."""
        reply: StreamedReply | WholeReply
        if fields.stream:
            reply = StreamedReply(
                self.engine,
                wire,
                request=request,
                response=response,
                include_usage=fields.include_usage,
            )
        else:
            reply = WholeReply(
                self.engine,
                wire,
                request=request,
                response=response,
                num_choices=len(prompts) * params.n,
            )
        reply.submit(prompts, params, cache_salt=fields.checked_cache_salt())


def check_content_type(request: Request, *, is_required: bool = False) -> None:
    """Raises InvalidRequestError for a body that says it is no JSON, or (where required) says nothing."""
    # Anything else is refused, so that a page in the user's browser cannot post to a local server
    # as a "simple" request.
    content_type = request.headers.get("content-type")
    if content_type is None and not is_required:
        return
    if content_type is None:
        raise InvalidRequestError("The Content-Type must be given, and be application/json.")
    media_type = content_type.split(";")[0].strip().lower()
    if media_type != "application/json":
        raise InvalidRequestError(
            f"The Content-Type must be application/json, not {media_type[:60]!r}; "
            "with curl add -H 'Content-Type: application/json'."
        )
