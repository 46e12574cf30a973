"""One HTTP answer made of several pooling requests' results.

Owns the sinks, the requests' common end, and that nothing goes on when one fails or the client leaves. What a
result means, and the answer's JSON, is the endpoints'.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import orjson

from graphllm.errors import EngineUnavailableError, GraphLLMError
from graphllm.outputs import FinishReason, SequenceDelta
from graphllm.sampling_params import SamplingParams
from graphllm.server.error_responses import send_error
from graphllm.server.generation.request import RequestWarning
from graphllm.server.generation.served_model import ServedModel
from graphllm.server.http import Request, Response

_PARAMS = SamplingParams(max_tokens=0)


class PooledReply:
    """An answer in the making.

    take(position, result): turns each result into what the answer keeps of it, as results come, because all
    at the end would take long. finish(reply, kept): the answer's body. model: the request's, a checked name.
    param: the request's field that texts are in, for errors.
    """

    def __init__(
        self,
        served: ServedModel,
        *,
        model: str,
        prefix: str,
        take: Callable[[int, array[float]], Any],
        finish: Callable[[PooledReply, list[Any]], dict[str, Any]],
        param: str,
        warnings: tuple[RequestWarning, ...],
        request: Request,
        response: Response,
        cache_salt: str | None = None,
        priority: int | None = None,
    ) -> None:
        self.id = f"{prefix}-{uuid4().hex}"
        self.model = model
        self.num_prompt_tokens = 0
        self._served = served
        self._take = take
        self._finish = finish
        self._param = param
        self._warnings = warnings
        self._request = request
        self._response = response
        self._cache_salt = cache_salt
        self._priority = priority or 0
        self._request_ids: list[str] = []
        self._kept: list[Any] = []
        self._num_missing = 0
        self._is_open = True

    @property
    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.num_prompt_tokens, "total_tokens": self.num_prompt_tokens}

    def submit(self, inputs: list[list[int]]) -> None:
        """Hand every input to the engine, or none: raises what `Engine.add` raises."""
        self._request.on_disconnect = self._abandon
        self._kept = [None] * len(inputs)
        self._num_missing = len(inputs)
        self.num_prompt_tokens = sum(map(len, inputs))
        for position, token_ids in enumerate(inputs):
            request_id = f"{self.id}-{position}"
            try:
                self._served.engine.add(
                    request_id,
                    token_ids,
                    params=_PARAMS,
                    sink=_InputSink(self, position),
                    cache_salt=self._cache_salt,
                    priority=self._priority,
                    pooling=True,
                    lora=self._served.lora_of(self.model),
                )
            except GraphLLMError as error:
                self._abandon()
                if error.param == "prompt":
                    error.param = self._param
                raise
            self._request_ids.append(request_id)

    def take(self, position: int, result: array[float]) -> None:
        self._kept[position] = self._take(position, result)

    def finish_input(self) -> None:
        self._num_missing -= 1
        if self._num_missing == 0 and self._is_open:
            self._is_open = False
            body = self._finish(self, self._kept)
            if self._warnings:
                body["warnings"] = [warning.as_json() for warning in self._warnings]
            self._response.send(200, orjson.dumps(body), headers=(("x-request-id", self.id),))

    def fail(self, error: GraphLLMError) -> None:
        if self._is_open:
            self._abandon()
            send_error(self._response, error)

    def _abandon(self) -> None:
        if self._is_open:
            self._is_open = False
            for request_id in self._request_ids:
                self._served.engine.abort(request_id)


class _InputSink:
    """The engine's view of one input."""

    __slots__ = ("_position", "_reply")

    def __init__(self, reply: PooledReply, position: int) -> None:
        self._reply = reply
        self._position = position

    def write(self, delta: SequenceDelta) -> None:
        if delta.finish_reason is FinishReason.ABORT:
            self._reply.fail(EngineUnavailableError("The request was cut short by the server."))
        elif delta.pooled is not None:
            self._reply.take(self._position, delta.pooled)

    def flush(self) -> None:
        """Nothing leaves before the end."""

    def finish(self) -> None:
        self._reply.finish_input()

    def fail(self, error: GraphLLMError) -> None:
        self._reply.fail(error)
