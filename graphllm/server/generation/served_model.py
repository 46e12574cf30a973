"""The one model behind the API, as its endpoints see it.

Owns the model's id in the API and the checks that every endpoint shares: the engine can serve, the
body is JSON, the model is this one.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cached_property
from typing import Annotated, TypeVar

import msgspec

from graphllm.engine.engine import Engine
from graphllm.errors import InvalidRequestError, ModelNotFoundError
from graphllm.output_formats.output_format import OutputFormat
from graphllm.output_formats.registry import find_format, guess_format, with_reasoning
from graphllm.server.generation.chat import ChatPreparation, ChatRequest, PreparedChat
from graphllm.server.generation.decoding import BodyDecoder, DecodedBody
from graphllm.server.generation.replies import StreamedReply, WholeReply
from graphllm.server.generation.request import GenerationRequest
from graphllm.server.generation.wire import Wire
from graphllm.server.http import Request, Response


class ModelBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A body that says which model it is for."""

    model: Annotated[str, msgspec.Meta(description="The served model's id.")]


RequestType = TypeVar("RequestType", bound=ModelBody)


AUTO = "auto"


class ServedModel:
    """name: the id clients use. created: seconds since 1970 when this process took it up.

    tool_call_parser, reasoning_parser: names of `output_formats`, or "auto" to guess from the model's chat
    template. lenient: fields that nobody knows are dropped with a warning instead of refused.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        *,
        tool_call_parser: str = AUTO,
        reasoning_parser: str = AUTO,
        lenient: bool = False,
    ) -> None:
        self.engine = engine
        self.name = name
        self.created = int(time.time())
        self.lenient = lenient
        self._tool_call_parser = tool_call_parser
        self._reasoning_parser = reasoning_parser

    @cached_property
    def output_format(self) -> OutputFormat:
        """How the model writes tool calls and reasoning. The model has to be loaded."""
        tokenizer = self.engine.tokenizer
        template = tokenizer.chat_template
        source = "" if template is None else "\n".join(template.sources.values())
        guessed = guess_format(source, tokenizer.added_tokens)
        found = guessed
        if self._tool_call_parser != AUTO:
            found = replace(find_format(self._tool_call_parser), reasoning=guessed.reasoning)
        if self._reasoning_parser != AUTO:
            found = with_reasoning(found, self._reasoning_parser)
        return found

    @cached_property
    def _chats(self) -> ChatPreparation:
        return ChatPreparation(self.engine.tokenizer, self.engine.max_model_len, self.output_format)

    def prepare_chat(self, chat: ChatRequest) -> PreparedChat:
        """Render, tokenize, and say how the answer is constrained and read.

        Raises InvalidRequestError, its `param` in the words of `ChatRequest`, and ContextLengthError.
        """
        self.engine.check_generates()
        return self._chats.prepare(chat)

    def check_name(self, name: str) -> None:
        """Raises ModelNotFoundError for any other model, and any name that is no loaded adapter's."""
        if name != self.name and not self.engine.has_adapter(name):
            raise ModelNotFoundError(
                f"The model '{name[:200]}' does not exist; this server serves '{self.name}'.", param="model"
            )

    def lora_of(self, name: str) -> str | None:
        """The adapter that a checked name asks for, None for the base model."""
        return None if name == self.name else name

    def decode(self, request: Request, decoder: BodyDecoder[RequestType]) -> DecodedBody[RequestType]:
        """The checked body. Raises EngineUnavailableError, InvalidRequestError, ModelNotFoundError."""
        self.engine.check_ready()
        check_content_type(request)
        body = decoder.decode(request.body)
        self.check_name(body.fields.model)
        return body

    def answer(
        self,
        generation: GenerationRequest,
        *,
        model: str,
        wire: Wire,
        stream: bool,
        request: Request,
        response: Response,
    ) -> None:
        """Generate for every prompt and answer, streamed or whole. Raises what `Engine.add` raises.

        model: the body's, a checked name.
        """
        kind = StreamedReply if stream else WholeReply
        generation = self.with_lora(generation, model)
        kind(self.engine, wire, request=request, response=response).submit(generation)

    def with_lora(self, generation: GenerationRequest, model: str) -> GenerationRequest:
        """The same request to the model of this name, which was checked."""
        lora = self.lora_of(model)
        return generation if lora is None else replace(generation, lora=lora)


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
