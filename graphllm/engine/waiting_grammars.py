"""Requests that were admitted and whose grammar is being compiled beside the event loop.

Owns them until the grammar is there: then they join the step loop, or are told why they cannot. Who compiles,
and where, is the compiler's; see `structured/`.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass

from graphllm.constraint import ConstraintFactory
from graphllm.engine.constraints import PendingConstraints
from graphllm.engine.metrics import EngineMetrics
from graphllm.engine.sink import Sink
from graphllm.errors import EngineUnavailableError, GraphLLMError
from graphllm.outputs import FinishReason
from graphllm.sequence import SequenceGroup

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Waiting:
    group: SequenceGroup
    sink: Sink


class WaitingGrammars:
    """`admit` takes a request whose sequences have their constraints."""

    def __init__(self, metrics: EngineMetrics, *, admit: Callable[[SequenceGroup, Sink], None]) -> None:
        self._metrics = metrics
        self._admit = admit
        self._requests: dict[str, _Waiting] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, group: SequenceGroup, sink: Sink, pending: PendingConstraints) -> None:
        """Admit the request when its grammar is compiled, a pass of the loop later at the earliest."""
        assert group.request_id not in self._requests, "request ids are unique"
        waiting = self._requests[group.request_id] = _Waiting(group, sink)
        pending.compilation.add_done_callback(lambda done: self._compiled(waiting, pending, done))

    def abort(self, request_id: str) -> bool:
        """Forget a request without telling its sink. Returns whether it was here."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._count_end(request, FinishReason.ABORT.value)
        return request is not None

    def fail_all(self, error: GraphLLMError) -> None:
        """End every request with `error`."""
        for request in tuple(self._requests.values()):
            self._fail(request, error)

    def _compiled(
        self, request: _Waiting, pending: PendingConstraints, compilation: asyncio.Future[ConstraintFactory]
    ) -> None:
        if self._requests.get(request.group.request_id) is not request:  # it was aborted, or has failed
            return
        try:
            if compilation.cancelled():
                raise EngineUnavailableError("The server is shutting down.")
            give_constraints(request.group, pending.complete(compilation.result()))
            self._admit(request.group, request.sink)  # may refuse it too, for its stop strings
        except GraphLLMError as error:
            # Others wait for the same grammar, and each may put its error into words of its own.
            self._fail(request, copy.copy(error))
        except Exception as error:
            logger.exception("the grammar of request %s could not be compiled", request.group.request_id)
            self._fail(request, GraphLLMError(f"Internal error: {error}"))
        else:
            del self._requests[request.group.request_id]

    def _fail(self, request: _Waiting, error: GraphLLMError) -> None:
        # One answer may stand behind several requests: its failure aborts the others.
        if self._requests.pop(request.group.request_id, None) is None:
            return
        self._count_end(request, "error")
        try:
            request.sink.fail(error)
        except Exception:
            logger.exception("request %s could not be told of its failure", request.group.request_id)

    def _count_end(self, request: _Waiting, reason: str) -> None:
        self._metrics.sequences_finished.labels(reason).inc(len(request.group.sequences))
        request.group.forget()


def give_constraints(group: SequenceGroup, constraint_of: ConstraintFactory) -> None:
    """A constraint at its beginning for every sequence of a request."""
    for sequence in group.sequences:
        sequence.constraint = constraint_of()
