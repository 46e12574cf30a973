"""The response object around its output: what a request asked for, and how the response stands.

Owns the object's fields beside `output`. What was asked for is encoded once; each state of the response adds
its status to it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from graphllm.errors import GraphLLMError
from graphllm.outputs import FinishReason
from graphllm.server import sse
from graphllm.server.generation.wire import Usage


class ResponseStatus(StrEnum):
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    INCOMPLETE = "incomplete"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @classmethod
    def of(cls, reason: FinishReason | None) -> ResponseStatus:
        """How a response ends whose only choice ended so."""
        return cls.INCOMPLETE if reason is FinishReason.LENGTH else cls.COMPLETED


class Envelope:
    """echo: the fields of the response object that repeat the request."""

    def __init__(self, response_id: str, echo: Mapping[str, Any]) -> None:
        self._fixed = sse.encode_json(
            {"id": response_id, "object": "response", "created_at": int(time.time()), **echo}
        )

    def head(
        self, status: ResponseStatus, *, usage: Usage | None = None, error: GraphLLMError | None = None
    ) -> bytes:
        """The response object without its output (`store.body_with_output` puts them together)."""
        state: dict[str, Any] = {
            "status": status,
            "error": None if error is None else {"code": "server_error", "message": error.message},
            "incomplete_details": None,
            "usage": None if usage is None else usage_as_json(usage),
        }
        if status is ResponseStatus.INCOMPLETE:
            state["incomplete_details"] = {"reason": "max_output_tokens"}
        if status is ResponseStatus.COMPLETED:
            state["completed_at"] = int(time.time())
        return self._fixed[:-1] + b"," + sse.encode_json(state)[1:]


def usage_as_json(usage: Usage) -> dict[str, Any]:
    """As the Responses API has it. Writing to the prefix cache costs nothing and is not counted."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
