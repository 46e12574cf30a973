"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

import orjson

from graphllm.adapter import Adapter
from graphllm.server.generation.served_model import ServedModel
from graphllm.server.http import Request, Response


class ModelRoutes:
    """Lists the one model and its adapters, once they can be used."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served

    def list(self, request: Request, response: Response) -> None:
        self._served.engine.check_ready()
        adapters = self._served.engine.loaded_adapters
        _send(response, {"object": "list", "data": [self._model(), *map(self._adapter, adapters)]})

    def retrieve(self, request: Request, response: Response) -> None:
        """Raises ModelNotFoundError."""
        self._served.engine.check_ready()
        name = request.path_params["name"]
        self._served.check_name(name)
        adapters = [each for each in self._served.engine.loaded_adapters if each.name == name]
        _send(response, self._adapter(adapters[0]) if adapters else self._model())

    def _model(self) -> dict[str, Any]:
        served = self._served
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "graphllm",
            "max_model_len": served.engine.max_model_len,
        }

    def _adapter(self, adapter: Adapter) -> dict[str, Any]:
        """The same as the model that it changes, and where it is from."""
        own = {"id": adapter.name, "created": adapter.created, "root": adapter.path}
        return {**self._model(), **own, "parent": self._served.name}


def _send(response: Response, body: dict[str, Any]) -> None:
    response.send(200, orjson.dumps(body), content_type="application/json")
