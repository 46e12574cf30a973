"""The sizes that steps are padded to, so that one captured graph serves every step of about its size.

Owns the sizes and the choice among them; pure numbers. The scheduler and the graph runner both go by it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

# Below this, a step's time is that of reading the weights, and padding costs nothing worth a graph.
_FINE_SIZES_FROM = 64
_COARSE_STEP = 8


@dataclass(frozen=True, slots=True)
class StepBuckets:
    """decode_sizes: rows of a step in which every row decodes. token_sizes: tokens of any other step.

    Both ascend. A step that no size can hold is run as it is. The largest token size is the most that a
    step may have, so a step that cuts a prompt short is full. The end of a prompt is never put off to save
    padding: the first token would wait a whole step for it.
    """

    decode_sizes: tuple[int, ...]
    token_sizes: tuple[int, ...]

    @classmethod
    def choose(
        cls, *, max_num_seqs: int, max_num_batched_tokens: int, decode_sizes: Iterable[int] | None = None
    ) -> StepBuckets:
        """The default sizes, or the given decode sizes (those above max_num_seqs are dropped)."""
        if decode_sizes is None:
            decode_sizes = (1, 2, 4, *range(8, max_num_seqs, 8), max_num_seqs)
        kept = sorted({size for size in decode_sizes if size <= max_num_seqs})
        return cls(tuple(kept), tuple(_token_sizes(max_num_batched_tokens)))

    def decode_size(self, num_rows: int) -> int | None:
        """The smallest decode size that holds so many rows."""
        return _at_least(self.decode_sizes, num_rows)

    def token_size(self, num_tokens: int) -> int | None:
        """The smallest token size that holds so many tokens."""
        return _at_least(self.token_sizes, num_tokens)


def _token_sizes(largest: int) -> list[int]:
    """Multiples of 8 up to 64, then steps of at most an eighth, then `largest`."""
    sizes = []
    size = _COARSE_STEP
    while size < largest:
        sizes.append(size)
        size += _COARSE_STEP if size < _FINE_SIZES_FROM else size // 64 * 8
    return [*sizes, largest]


def _at_least(sizes: tuple[int, ...], wanted: int) -> int | None:
    index = bisect_left(sizes, wanted)
    return sizes[index] if index < len(sizes) else None
