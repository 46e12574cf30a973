"""Rows of logits cut into tiles of 64 neighbouring tokens, and for kernels into chunks of tiles.

Owns the two sizes. Most of a vocabulary can neither be the best token nor win a draw, and a tile's
maximum proves that for 64 tokens at once, so the sampler's operations look at tile maxima first.
The tile is part of the random numbers' definition too (`random_draws.py`): changing it changes
what a seed gives. The chunk is what one program of a kernel reads, and changes no result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

TILE_SIZE = 64
CHUNK_SIZE = 2048
"""8 KB of float32, which 128 threads have in flight at once: 75 programs for one row of 151,936 tokens."""

_LARGEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).max)


def split_into_tiles(logits: Tensor) -> Tensor:
    """View [num_rows, vocab] as [num_rows, num_tiles, 64].

    A copy is made only where the vocabulary is no multiple of 64: the last tile is then filled up
    with -inf, or with the smallest value of an integer dtype.
    """
    num_rows, vocab_size = logits.shape
    missing = -vocab_size % TILE_SIZE
    if missing:
        lowest = float("-inf") if logits.is_floating_point() else torch.iinfo(logits.dtype).min
        logits = functional.pad(logits, (0, missing), value=lowest)
    return logits.reshape(num_rows, (vocab_size + missing) // TILE_SIZE, TILE_SIZE)


def num_chunks(vocab_size: int) -> int:
    """How many programs read one row."""
    return -(-vocab_size // CHUNK_SIZE)


def num_tiles(vocab_size: int) -> int:
    return -(-vocab_size // TILE_SIZE)


@triton.jit
def without_nan(logits):
    """NaN as -inf, and +inf as the largest number."""
    return tl.minimum(tl.where(logits == logits, logits, float("-inf")), _LARGEST)
