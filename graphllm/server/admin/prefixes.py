"""POST, GET and DELETE /admin/prefixes: system prompts that stay in the KV cache.

Owns the routes' JSON. What pinning means, and its quota, is the engine's (`engine/pinned_prefixes.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import orjson

from graphllm.engine.engine import Engine
from graphllm.engine.pinned_prefixes import PinnedPrefix, chat_prefix
from graphllm.errors import GraphLLMError, InvalidRequestError
from graphllm.server.error_responses import send_error
from graphllm.server.generation.decoding import BodyDecoder
from graphllm.server.generation.fields import KnownField
from graphllm.server.generation.messages import TemplateFeatures, template_messages
from graphllm.server.generation.prompts import encoded_prompts
from graphllm.server.generation.served_model import check_content_type
from graphllm.server.http import Request, Response
from graphllm.server.openai.messages import ChatMessage, plain_messages

logger = logging.getLogger(__name__)

_KNOWN_FIELDS: Final[Mapping[str, KnownField]] = {
    "model": KnownField(note="Prefixes are pinned in the one model that is served.")
}


class PinRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A text or token ids, or the messages that chats begin with; exactly one of both."""

    prompt: str | list[str | int | list[int]] | None = None
    messages: list[ChatMessage] | None = None
    cache_salt: str | None = None


class PrefixRoutes:
    """Pins, lists and unpins the prefixes of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._decoder = BodyDecoder(PinRequest, _KNOWN_FIELDS)
        self._tasks: set[asyncio.Task[None]] = set()

    def pin(self, request: Request, response: Response) -> None:
        """Answers when the prefix is computed. Raises GraphLLMError for what is wrong with the body."""
        self._engine.check_ready()
        check_content_type(request, is_required=True)
        fields = self._decoder.decode(request.body).fields
        token_ids = self._token_ids(fields)
        if fields.cache_salt == "":
            raise InvalidRequestError("'cache_salt' must not be empty.", param="cache_salt")
        task = asyncio.get_running_loop().create_task(
            self._pin(token_ids, fields.cache_salt, response=response), name="pin-prefix"
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def list_pinned(self, request: Request, response: Response) -> None:
        self._engine.check_ready()
        pinned = [_as_json(prefix) for prefix in self._engine.pinned_prefixes]
        _send(response, {"object": "list", "data": pinned})

    def unpin(self, request: Request, response: Response) -> None:
        """Raises NotFoundError."""
        self._engine.check_ready()
        prefix_id = request.path_params["id"]
        self._engine.unpin_prefix(prefix_id)
        _send(response, {"id": prefix_id, "object": "pinned_prefix", "deleted": True})

    def _token_ids(self, fields: PinRequest) -> list[int]:
        tokenizer, max_model_len = self._engine.tokenizer, self._engine.max_model_len
        if (fields.prompt is None) == (fields.messages is None):
            raise InvalidRequestError("Give either 'prompt' or 'messages'.", param="prompt")
        if fields.prompt is not None:
            prompts = list(encoded_prompts(fields.prompt, tokenizer, max_model_len=max_model_len))
            if len(prompts) != 1:
                raise InvalidRequestError("'prompt' must be one text or one array of ids.", param="prompt")
            return prompts[0]
        assert fields.messages is not None
        if tokenizer.chat_template is None:
            raise InvalidRequestError("This model has no chat template; give 'prompt'.", param="messages")
        features = TemplateFeatures.of(tokenizer.chat_template)
        messages, _ = template_messages(plain_messages(fields.messages), features)
        return chat_prefix(messages, tokenizer, max_tokens=max_model_len)

    async def _pin(self, token_ids: list[int], cache_salt: str | None, *, response: Response) -> None:
        try:
            pinned = await self._engine.pin_prefix(token_ids, cache_salt=cache_salt)
            _send(response, _as_json(pinned))
        except GraphLLMError as error:
            send_error(response, error)
        except Exception:
            logger.exception("a prefix could not be pinned")
            send_error(response, GraphLLMError("The server had an error while handling this request."))


def _as_json(prefix: PinnedPrefix) -> dict[str, Any]:
    return {
        "id": prefix.id,
        "object": "pinned_prefix",
        "num_tokens": prefix.num_tokens,
        "num_blocks": prefix.num_blocks,
    }


def _send(response: Response, body: dict[str, Any]) -> None:
    response.send(200, orjson.dumps(body), content_type="application/json")
