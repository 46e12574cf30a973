"""POST /v1/messages and POST /v1/messages/count_tokens.

Owns the order of the checks, and how much of `max_tokens` the context has room for: clients of this API send
large limits as a matter of course, so a limit that does not fit is cut instead of refused.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import orjson

from graphllm.errors import ContextLengthError, InvalidRequestError
from graphllm.sampling_params import SamplingParams
from graphllm.server.anthropic.known_fields import COUNT_FIELDS, MESSAGES_FIELDS
from graphllm.server.anthropic.messages import read_conversation
from graphllm.server.anthropic.protocol import CountTokensRequest, MessagesRequest
from graphllm.server.anthropic.wire import MessageOptions, MessagesWire
from graphllm.server.generation.chat import ChatRequest, PreparedChat
from graphllm.server.generation.decoding import BodyDecoder, NestedReader
from graphllm.server.generation.fields import renamed, renamed_warning
from graphllm.server.generation.request import RequestWarning
from graphllm.server.generation.served_model import ServedModel
from graphllm.server.http import Request, Response

logger = logging.getLogger(__name__)


class Messages:
    """Generates the assistant's next message, or counts what it would read for it."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._messages_decoder = BodyDecoder(MessagesRequest, MESSAGES_FIELDS, lenient=served.lenient)
        self._count_decoder = BodyDecoder(CountTokensRequest, COUNT_FIELDS, lenient=served.lenient)

    def create(self, request: Request, response: Response) -> None:
        """Raises GraphLLMError for whatever is wrong with the request; nothing has been sent then."""
        body = self._served.decode(request, self._messages_decoder)
        try:
            self._create(body.fields, body.warnings, request=request, response=response)
        except InvalidRequestError as error:
            raise renamed(error, body.fields.client_names) from None

    def count_tokens(self, request: Request, response: Response) -> None:
        """Raises GraphLLMError like `create`."""
        fields = self._served.decode(request, self._count_decoder).fields
        try:
            fields.check()
            params = SamplingParams(structured_outputs=fields.structured_outputs())
            prepared, _ = self._prepare(fields, params)
        except InvalidRequestError as error:
            raise renamed(error, fields.client_names) from None
        (prompt,) = prepared.generation.prompts
        response.send(200, orjson.dumps({"input_tokens": len(prompt)}))

    def _create(
        self,
        fields: MessagesRequest,
        warnings: tuple[RequestWarning, ...],
        *,
        request: Request,
        response: Response,
    ) -> None:
        fields.check()
        params = fields.sampling_params()
        prepared, own_warnings = self._prepare(
            fields, params, cache_salt=fields.cache_salt, priority=fields.priority
        )
        generation = replace(prepared.generation, structure_name=fields.client_names["structured_outputs"])
        room = self._served.engine.max_model_len - len(generation.prompts[0])
        # With no room at all the engine says so.
        is_clamped = 0 < room < fields.max_tokens
        if is_clamped:
            generation = replace(generation, params=replace(generation.params, max_tokens=room))
        wire = MessagesWire(
            MessageOptions(
                model=fields.model,
                stop_sequences=params.stop,
                hides_thinking=fields.hides_thinking,
                is_clamped=is_clamped,
                warnings=(*warnings, *own_warnings),
            )
        )
        if fields.metadata is not None and fields.metadata.user_id is not None:
            logger.debug("%s is for user %r", wire.reply_id, fields.metadata.user_id[:200])
        self._served.answer(
            generation,
            model=fields.model,
            wire=wire,
            stream=bool(fields.stream),
            request=request,
            response=response,
        )

    def _prepare(
        self,
        fields: CountTokensRequest,
        params: SamplingParams,
        *,
        cache_salt: str | None = None,
        priority: int | None = None,
    ) -> tuple[PreparedChat, tuple[RequestWarning, ...]]:
        max_model_len = self._served.engine.max_model_len
        if len(fields.messages) > max_model_len:
            raise ContextLengthError(
                f"There are {len(fields.messages)} messages, more than the model's context has tokens "
                f"({max_model_len}).",
                param="messages",
            )
        reader = NestedReader(lenient=self._served.lenient)
        conversation = read_conversation(fields.messages, fields.system, reader=reader)
        is_prefilled = conversation.ends_with_assistant
        tools = fields.function_tools(reader)
        chat = ChatRequest(
            messages=conversation.messages,
            params=params,
            tools=tools,
            tool_choice=fields.chosen_tools(tools),
            parallel_tool_calls=fields.allows_parallel_calls,
            template_kwargs=fields.chat_template_kwargs or {},
            add_generation_prompt=not is_prefilled,
            continue_final_message=is_prefilled,
            reasoning_effort=fields.reasoning_effort,
            cache_salt=cache_salt,
            priority=priority or 0,
        )
        prepared = self._served.prepare_chat(chat)
        shared = (renamed_warning(warning, fields.client_names) for warning in prepared.warnings)
        return prepared, (*fields.own_warnings(), *reader.warnings, *conversation.warnings, *shared)
