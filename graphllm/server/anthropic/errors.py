"""Errors in Anthropic's form, on its routes only. Classes and statuses are those of all other routes."""

from __future__ import annotations

from functools import partial
from typing import Any
from uuid import uuid4

from graphllm.errors import GraphLLMError
from graphllm.server.http import Response

ROUTES = "/v1/messages"
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def is_anthropic(path: str) -> bool:
    return path == ROUTES or path.startswith(ROUTES + "/")


def speak_anthropic(response: Response) -> None:
    """Give an answer Anthropic's error form and `request-id`, which its clients show."""
    request_id = f"req_{uuid4().hex}"
    response.extra_headers = (("request-id", request_id),)
    response.error_body = partial(error_body, request_id=request_id)


def error_body(error: GraphLLMError, *, request_id: str | None = None) -> dict[str, Any]:
    """The error object. param: the field at fault, as in OpenAI's form; Anthropic's clients pass over it."""
    body: dict[str, Any] = {
        "type": "error",
        "error": {"type": _TYPES.get(error.status, "api_error"), "message": error.message},
    }
    if error.param is not None:
        body["error"]["param"] = error.param
    if request_id is not None:
        body["request_id"] = request_id
    return body
