"""The greedy choice.

    token = min { i : logits_i = max_j logits_j }

Owns nothing but this. Logits hold no NaN here; a row of nothing but -inf gives token 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphllm.kernels.vocab_tiles import TILE_SIZE, split_into_tiles


def argmax_ref(logits: Tensor) -> Tensor:
    """The most likely token of each row, the lowest id among equals: [num_rows] int64.

    logits: [num_rows, vocab] float32 without NaN. Equal to `logits.argmax(1)`, which is not
    vectorised on a CPU: maxima of tiles are, and argmax then sees one tile in full.
    """
    tiles = split_into_tiles(logits)
    best_tiles = tiles.amax(2).argmax(1)  # [num_rows] int64; argmax gives the first of equals
    rows = torch.arange(logits.shape[0], device=logits.device)
    return best_tiles * TILE_SIZE + tiles[rows, best_tiles].argmax(1)
