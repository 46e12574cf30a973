"""Rows of logits cut into tiles of 64 neighbouring tokens.

Owns the tile size. Most of a vocabulary can neither be the best token nor win a draw, and a tile's
maximum proves that for 64 tokens at once, so the sampler's operations look at tile maxima first.
The size is part of the random numbers' definition too (`random_draws.py`): changing it changes
what a seed gives.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

TILE_SIZE = 64


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
