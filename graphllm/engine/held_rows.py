"""The sequences that the host constrains: their masks before a token is sampled, their tokens afterwards.

Owns the one launched step whose held rows are not sampled yet. Masks are made in slices of about a
millisecond, because hundreds of rows take several and the loop serves sockets in between. What a constraint
allows is its own business, and what happens to a request without a token left is the step loop's.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from graphllm.batch import SamplePair
from graphllm.constraint import MASK_WORD_BITS
from graphllm.engine.metrics import EngineMetrics
from graphllm.errors import NoAllowedTokenError
from graphllm.outputs import FinishReason
from graphllm.runner.model_runner import MaskRow, StepHandle
from graphllm.scheduler.scheduler import Scheduler
from graphllm.sequence import Sequence

SLICE_SECONDS = 0.001


class HeldRows:
    """`on_broken` is told of a sequence whose constraint allows nothing or raised; it ends the request."""

    def __init__(
        self,
        scheduler: Scheduler,
        metrics: EngineMetrics,
        *,
        vocab_size: int,
        on_broken: Callable[[Sequence, Exception], None],
    ) -> None:
        self._scheduler = scheduler
        self._metrics = metrics
        self._on_broken = on_broken
        num_tail_bits = vocab_size % MASK_WORD_BITS
        # The bits of a mask's last word that stand for tokens, as a signed number.
        self._tail = (1 << num_tail_bits) - 1 if num_tail_bits else -1
        self._handle: StepHandle | None = None

    # -- before sampling --------------------------------------------------------------------------

    def launched(self, handle: StepHandle) -> None:
        """Take care of a step's held rows, if it has any."""
        assert self._handle is None, "the last step is not sampled yet"
        if handle.is_held:
            self._handle = handle

    @property
    def are_pending(self) -> bool:
        """Whether a launched step is not sampled yet: until it is, no other can be launched."""
        return self._handle is not None

    @property
    def are_due(self) -> bool:
        """Whether every token before those of the pending rows is known, so that they can be sampled."""
        return self._handle is not None and all(
            not pair.held or not _is_live(pair) or pair.sequence.num_in_flight_tokens == 1
            for pair in self._handle.batch.pairs
        )

    def sample_slice(self, seconds: float = SLICE_SECONDS) -> None:
        """Make masks for at most about `seconds`; with the last one, have the device sample the rows."""
        handle = self._handle
        assert handle is not None
        started = time.perf_counter()
        for pair, row in handle.held_rows:
            if _is_live(pair):
                self._restrict(pair.sequence, row)
            now = time.perf_counter()
            if now - started > seconds:
                self._metrics.mask_seconds.inc(now - started)
                return
        handle.sample()
        self._handle = None
        self._metrics.mask_seconds.inc(time.perf_counter() - started)

    def _restrict(self, sequence: Sequence, row: MaskRow) -> None:
        constraint = sequence.constraint
        assert constraint is not None, "only rows of constrained sequences are held"
        try:
            constraint.restrict(row.data)
            row[-1] &= self._tail
            if not row.any():
                raise NoAllowedTokenError(
                    "No token may come next: together, the request's structured_outputs, allowed_token_ids, "
                    "bad_words and min_tokens leave none."
                )
        except Exception as error:
            # Its row is sampled with the others and means nothing any more.
            self._on_broken(sequence, error)

    # -- after sampling ---------------------------------------------------------------------------

    def accept(self, sequence: Sequence, token_id: int) -> bool:
        """A sampled token of a constrained sequence, which ends with it where nothing can follow.

        Returns whether the token ends the sequence as a part of its text. Raises ConstraintViolation, and
        whatever a defective constraint raises.
        """
        constraint = sequence.constraint
        assert constraint is not None
        constraint.accept(token_id)
        self._metrics.constrained_tokens.inc()
        if not constraint.is_finished or sequence.finish_reason is FinishReason.STOP:
            return False
        # An output that is complete is not cut short, even where max_tokens ends it too.
        self._scheduler.finish(sequence, FinishReason.STOP)
        sequence.finish_reason = FinishReason.STOP
        return token_id not in self._scheduler.eos_token_ids


def _is_live(pair: SamplePair) -> bool:
    """Whether a pair's token will count: its sequence has not ended and still is the slot's owner."""
    sequence = pair.sequence
    return not sequence.is_finished and sequence.slot_generation == pair.generation
