"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

import orjson

from graphllm.server.generation.served_model import ServedModel
from graphllm.server.http import Request, Response


class ModelRoutes:
    """Lists the one model, once it can be used."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served

    def list(self, request: Request, response: Response) -> None:
        self._served.engine.check_ready()
        _send(response, {"object": "list", "data": [self._model()]})

    def retrieve(self, request: Request, response: Response) -> None:
        """Raises ModelNotFoundError."""
        self._served.engine.check_ready()
        self._served.check_name(request.path_params["name"])
        _send(response, self._model())

    def _model(self) -> dict[str, Any]:
        served = self._served
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "graphllm",
            "max_model_len": served.engine.max_model_len,
        }


def _send(response: Response, body: dict[str, Any]) -> None:
    response.send(200, orjson.dumps(body), content_type="application/json")
