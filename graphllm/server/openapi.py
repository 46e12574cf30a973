"""GET /openapi.json: the API described for machines, from the same table and structs that serve it.

Owns the document. What a body may hold is said by the request structs and their fields' descriptions; which
routes there are by the route table in `app.py`. Answers are described by name only: their shapes are the
dialects' own, documented by OpenAI and Anthropic.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import orjson

from graphllm import __version__
from graphllm.server.http import Request, Response
from graphllm.server.response import Handler

_PARAMETER = re.compile(r"\{([a-z_]+)(?::path)?\}")
_ERROR_STATUSES = {"400": "The request is wrong; `error.param` names the field.", "503": "Not ready."}


@dataclass(frozen=True, slots=True)
class ApiRoute:
    """A route of the API. body: the struct that its JSON is decoded into; None where it takes none.

    is_streamed: whether the answer may be server-sent events.
    """

    method: str
    pattern: str
    handler: Handler
    summary: str
    body: type[msgspec.Struct] | None = None
    is_streamed: bool = False


class OpenApiRoute:
    """Serves the document, which is built when it is first asked for."""

    def __init__(self, routes: Sequence[ApiRoute], *, needs_key: bool) -> None:
        self._routes = routes
        self._needs_key = needs_key
        self._encoded: bytes | None = None

    def get(self, request: Request, response: Response) -> None:
        if self._encoded is None:
            self._encoded = orjson.dumps(openapi_document(self._routes, needs_key=self._needs_key))
        response.send(200, self._encoded, content_type="application/json")


def openapi_document(routes: Sequence[ApiRoute], *, needs_key: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document of these routes."""
    bodies = [route.body for route in routes if route.body is not None]
    references, schemas = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(bodies, references, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = _PARAMETER.sub(lambda match: "{" + match[1] + "}", route.pattern)
        operation = _operation(route, None if route.body is None else schema_of[route.body])
        paths.setdefault(path, {})[route.method.lower()] = operation
    components: dict[str, Any] = {"schemas": schemas}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "graphllm",
            "version": __version__,
            "description": "Serves open-weight language models over the OpenAI and Anthropic APIs.",
        },
        "paths": paths,
        "components": components,
    }
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _operation(route: ApiRoute, body_schema: dict[str, Any] | None) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if route.is_streamed:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": _operation_id(route),
        "responses": {"200": {"description": "The answer.", "content": content}},
    }
    for status, description in _ERROR_STATUSES.items():
        if body_schema is not None:
            operation["responses"][status] = {"description": description}
    names = _PARAMETER.findall(route.pattern)
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if body_schema is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": body_schema}},
        }
    return operation


def _operation_id(route: ApiRoute) -> str:
    words = re.findall(r"[a-z0-9]+", f"{route.method} {route.pattern}".lower())
    return "_".join(words)
