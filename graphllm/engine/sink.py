"""Where a request's tokens go. The engine calls, the server and the offline API implement."""

from __future__ import annotations

from typing import Protocol

from graphllm.errors import GraphLLMError
from graphllm.outputs import SequenceDelta


class Sink(Protocol):
    """One running request's consumer.

    All calls come from the event loop, between device steps: they must neither block nor raise.
    They may call `Engine.abort`.
    """

    def write(self, delta: SequenceDelta) -> None:
        """One step's news of one sequence."""

    def flush(self) -> None:
        """The step's writes to this sink are complete: touch the socket once, now."""

    def finish(self) -> None:
        """Every sequence has ended. No call follows."""

    def fail(self, error: GraphLLMError) -> None:
        """The request died. No call follows."""
