"""Predicts when a step ends, so that the next one is scheduled as late as is safe.

Owns moving averages of device time for each kind of step and of the host's time to schedule and
launch. Late scheduling matters because a request that arrives while a step runs can only join a
step that has not been scheduled yet.
"""

from __future__ import annotations

from graphllm.batch import ScheduledBatch

_NEW_SHARE = 0.3  # of the latest measurement in an average
_SHORTEST_MARGIN = 0.002  # seconds; event-loop timers have whole milliseconds
_MARGIN_SHARE = 0.05  # of the predicted step


class StepTimer:
    """Times are seconds."""

    __slots__ = ("_host", "_steps")

    def __init__(self) -> None:
        self._steps: dict[tuple[int, int, bool, bool], float] = {}
        self._host = 0.001

    def predict(self, batch: ScheduledBatch) -> float | None:
        """Device time of a step like `batch`; None when none was seen."""
        return self._steps.get(_kind(batch))

    def lead(self, predicted: float) -> float:
        """How long before a step's predicted end the next one must be scheduled."""
        return max(_SHORTEST_MARGIN, _MARGIN_SHARE * predicted) + 2 * self._host

    def observe_step(self, batch: ScheduledBatch, seconds: float) -> None:
        kind = _kind(batch)
        known = self._steps.get(kind, seconds)
        self._steps[kind] = known + _NEW_SHARE * (seconds - known)

    def observe_host(self, seconds: float) -> None:
        """The time that scheduling and launching one step took."""
        self._host += _NEW_SHARE * (seconds - self._host)


def _kind(batch: ScheduledBatch) -> tuple[int, int, bool, bool]:
    """Steps of one kind take about as long: same decode rows, prompt tokens within an eighth, and both or
    neither score, and wait for masks."""
    prefill = batch.num_tokens - batch.num_decode_rows
    shift = max(0, prefill.bit_length() - 4)
    return batch.num_decode_rows, prefill >> shift << shift, bool(batch.spans), batch.has_held_pairs
