"""How fast this machine copies KV blocks and computes prompts, measured while it serves.

Owns the measurements behind the scheduler's choice between the two ways to a prefix that has gone to host
memory: copying it up, or computing it again.
"""

from __future__ import annotations

from graphllm.batch import ScheduledBatch

# What an average looks back on. It weighs by amount: small copies and short prompts cost several times as
# much for each block and token, and would hide what a long prefix costs.
_BLOCKS_REMEMBERED = 1_000
_TOKENS_REMEMBERED = 10_000
# Before anything was measured: a slow bus, and a card's prefill of a small model.
_FIRST_BYTES_PER_SECOND = 10e9
_FIRST_SECONDS_PER_TOKEN = 1e-4
_MIN_PROMPT_SHARE = 0.5  # of a step's tokens, for its time to say something of prompts


class MeasuredRates:
    """The scheduler's `TransferPredictor`. Times are seconds."""

    __slots__ = ("_per_block", "_per_token")

    def __init__(self, bytes_per_block: int) -> None:
        self._per_block = _Average(bytes_per_block / _FIRST_BYTES_PER_SECOND, _BLOCKS_REMEMBERED)
        self._per_token = _Average(_FIRST_SECONDS_PER_TOKEN, _TOKENS_REMEMBERED)

    def seconds_to_copy(self, num_blocks: int) -> float:
        return num_blocks * self._per_block.value

    def seconds_to_prefill(self, num_tokens: int) -> float:
        return num_tokens * self._per_token.value

    def observe_copy(self, num_blocks: int, seconds: float) -> None:
        """A transfer of `num_blocks` took so long."""
        self._per_block.add(seconds, num_blocks)

    def observe_step(self, batch: ScheduledBatch, seconds: float) -> None:
        """A step took so long; only steps that are mostly prompt, score nothing of it and wait for no masks
        say what a prompt's token costs."""
        num_prompt_tokens = batch.num_tokens - batch.num_decode_rows
        if (
            not batch.spans
            and not batch.has_held_pairs
            and num_prompt_tokens > 0
            and num_prompt_tokens >= _MIN_PROMPT_SHARE * batch.num_tokens
        ):
            self._per_token.add(seconds, num_prompt_tokens)


class _Average:
    """Seconds for one of something, over about the latest `num_remembered`; a guess before the first."""

    __slots__ = ("_count", "_num_remembered", "_seconds", "value")

    def __init__(self, guess: float, num_remembered: int) -> None:
        self.value = guess
        self._num_remembered = num_remembered
        self._count = 0.0
        self._seconds = 0.0

    def add(self, seconds: float, count: int) -> None:
        kept = self._num_remembered / (self._num_remembered + count)
        self._count = kept * self._count + count
        self._seconds = kept * self._seconds + seconds
        self.value = self._seconds / self._count
