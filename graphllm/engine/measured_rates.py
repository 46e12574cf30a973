"""How fast this machine copies KV blocks and computes prompts, measured while it serves.

Owns the moving averages behind the scheduler's choice between the two ways to a prefix that has gone to host
memory: copying it up, or computing it again.
"""

from __future__ import annotations

from graphllm.batch import ScheduledBatch

_NEW_SHARE = 0.2  # of the latest measurement in an average
# Before anything was measured: a slow bus, and a card's prefill of a small model.
_FIRST_BYTES_PER_SECOND = 10e9
_FIRST_SECONDS_PER_TOKEN = 1e-4
_MIN_PROMPT_SHARE = 0.5  # of a step's tokens, for its time to say something of prompts


class MeasuredRates:
    """The scheduler's `TransferPredictor`. Times are seconds."""

    __slots__ = ("_per_block", "_per_token")

    def __init__(self, bytes_per_block: int) -> None:
        self._per_block = _Average(bytes_per_block / _FIRST_BYTES_PER_SECOND)
        self._per_token = _Average(_FIRST_SECONDS_PER_TOKEN)

    def seconds_to_copy(self, num_blocks: int) -> float:
        return num_blocks * self._per_block.value

    def seconds_to_prefill(self, num_tokens: int) -> float:
        return num_tokens * self._per_token.value

    def observe_copy(self, num_blocks: int, seconds: float) -> None:
        """A transfer of `num_blocks` took so long."""
        self._per_block.add(seconds / num_blocks)

    def observe_step(self, batch: ScheduledBatch, seconds: float) -> None:
        """A step took so long; only steps that are mostly prompt say what a prompt's token costs."""
        num_prompt_tokens = batch.num_tokens - batch.num_decode_rows
        if num_prompt_tokens > 0 and num_prompt_tokens >= _MIN_PROMPT_SHARE * batch.num_tokens:
            self._per_token.add(seconds / num_prompt_tokens)


class _Average:
    """A moving average; the first measurement takes the place of the guess."""

    __slots__ = ("_is_guess", "value")

    def __init__(self, guess: float) -> None:
        self.value = guess
        self._is_guess = True

    def add(self, measured: float) -> None:
        if self._is_guess:
            self.value = measured
            self._is_guess = False
        else:
            self.value += _NEW_SHARE * (measured - self.value)
