"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: adapters that come and go while others are served.

Owns the routes' JSON, whose names are vLLM's. What a load and an unload mean is the engine's
(`engine/adapters.py`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec
import orjson
from msgspec import Meta

from graphllm.adapter import Adapter
from graphllm.engine.engine import Engine
from graphllm.errors import CheckpointError, GraphLLMError, InvalidRequestError
from graphllm.server.error_responses import send_error
from graphllm.server.generation.decoding import BodyDecoder
from graphllm.server.generation.fields import KnownField
from graphllm.server.generation.served_model import check_content_type
from graphllm.server.http import Request, Response

logger = logging.getLogger(__name__)

_KNOWN_FIELDS: Final[Mapping[str, KnownField]] = {
    "base_model_name": KnownField(note="Adapters are of the one model that is served."),
    "is_3d_lora_weight": KnownField(neutral=(False,), note="Adapters of experts are not served."),
    "lora_int_id": KnownField(note="Adapters are told apart by their names.", is_tolerated=True),
}


class LoadRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of POST /v1/load_lora_adapter."""

    lora_name: Annotated[str, Meta(description="What requests will call it, as their model.")]
    lora_path: Annotated[str, Meta(description="A folder of the server's machine, as peft writes it.")]
    load_inplace: Annotated[
        bool | None, Meta(description="true lets it take the place of a loaded adapter of that name.")
    ] = None


class UnloadRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of POST /v1/unload_lora_adapter."""

    lora_name: Annotated[str, Meta(description="The name of a loaded adapter.")]


class AdapterRoutes:
    """Loads and unloads the adapters of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._load_decoder = BodyDecoder(LoadRequest, _KNOWN_FIELDS)
        self._unload_decoder = BodyDecoder(UnloadRequest, _KNOWN_FIELDS)
        self._tasks: set[asyncio.Task[None]] = set()

    def load(self, request: Request, response: Response) -> None:
        """Answers when requests may name it. Raises GraphLLMError for what is wrong with the body."""
        self._check(request)
        fields = self._load_decoder.decode(request.body).fields
        self._engine.adapters.check_name(fields.lora_name, replaces=bool(fields.load_inplace))
        if not fields.lora_path:
            raise InvalidRequestError("'lora_path' must not be empty.", param="lora_path")
        task = asyncio.get_running_loop().create_task(self._load(fields, response), name="load-adapter")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def unload(self, request: Request, response: Response) -> None:
        """Answers at once; requests that were admitted keep the adapter to their end.

        Raises ModelNotFoundError.
        """
        self._check(request)
        fields = self._unload_decoder.decode(request.body).fields
        adapter = self._engine.adapters.unload(fields.lora_name)
        logger.info("adapter %s was unloaded; %d requests keep it", adapter.name, adapter.num_requests)
        _send(response, {**_as_json(adapter), "deleted": True, "num_requests": adapter.num_requests})

    def _check(self, request: Request) -> None:
        self._engine.check_ready()
        check_content_type(request, is_required=True)

    async def _load(self, fields: LoadRequest, response: Response) -> None:
        try:
            adapter = await self._engine.adapters.load(
                fields.lora_name, fields.lora_path, replaces=bool(fields.load_inplace)
            )
            logger.info("adapter %s: rank %d, %s", adapter.name, adapter.rank, adapter.path)
            _send(response, _as_json(adapter))
        except CheckpointError as error:
            send_error(response, InvalidRequestError(error.message, param="lora_path"))
        except GraphLLMError as error:
            send_error(response, error)
        except Exception:
            logger.exception("adapter %s could not be loaded", fields.lora_name)
            send_error(response, GraphLLMError("The server had an error while handling this request."))


def _as_json(adapter: Adapter) -> dict[str, Any]:
    return {"id": adapter.name, "object": "lora_adapter", "path": adapter.path, "rank": adapter.rank}


def _send(response: Response, body: dict[str, Any]) -> None:
    response.send(200, orjson.dumps(body), content_type="application/json")
