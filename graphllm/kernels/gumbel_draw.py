"""One token drawn from softmax(logits), by the Gumbel-max trick.

    token = argmax_i (logits_i + g_i),    g_i from `random_draws.py`

Owns the search for the winner, not the noise. Ties go to the lowest id.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphllm.kernels.random_draws import DrawKeys, DrawPurpose, exponential_ref, tile_minima_ref
from graphllm.kernels.vocab_tiles import TILE_SIZE, split_into_tiles

# A tile is dropped when its bound is below the best value found by more than float32 rounding.
_ROUNDING_SLACK = 1e-3


def gumbel_draw_ref(logits: Tensor, keys: DrawKeys) -> Tensor:
    """One token for each row: [num_rows] int64.

    logits: [num_rows, vocab] float32, already divided by the temperature, no NaN and no +inf. -inf
    is never drawn, except that a row of nothing else gives token 0.

    A token's value is at most its tile's largest logit plus its tile's largest noise. The best of
    the tokens that carry their tile's largest noise is a value reached, and only tiles whose bound
    comes up to it are drawn in full: about one in twenty for a language model's logits.
    """
    tiles = split_into_tiles(logits)  # [num_rows, num_tiles, 64]
    tile_ids = torch.arange(tiles.shape[1], device=logits.device)[None]
    minima, owners = tile_minima_ref(keys, tile_ids)  # [num_rows, num_tiles] float32, int64
    noise_bounds = -minima.log()
    bounds = tiles.amax(2) + noise_bounds
    reached = (tiles.gather(2, owners[:, :, None])[:, :, 0] + noise_bounds).amax(1, keepdim=True)
    contends = (bounds >= reached - _ROUNDING_SLACK) & (bounds > float("-inf"))
    rows, contenders = contends.nonzero(as_tuple=True)  # [num_contenders] int64 each

    flat_tiles = rows * tiles.shape[1] + contenders
    values = tiles.reshape(-1, TILE_SIZE).index_select(0, flat_tiles) + _tile_noise(
        keys.select(rows), contenders, minima[rows, contenders], owners[rows, contenders]
    )
    best_lanes = values.argmax(1)
    best_values = torch.full_like(bounds, float("-inf"))
    best_values[rows, contenders] = values.gather(1, best_lanes[:, None])[:, 0]
    tokens = torch.zeros_like(owners)
    tokens[rows, contenders] = contenders * TILE_SIZE + best_lanes
    return tokens.gather(1, best_values.argmax(1, keepdim=True))[:, 0]


def _tile_noise(keys: DrawKeys, tile_ids: Tensor, minima: Tensor, owners: Tensor) -> Tensor:
    """The noise of all tokens of tiles: [n, 64] float32; all arguments have n rows."""
    groups = tile_ids[:, None] * (TILE_SIZE // 4) + torch.arange(TILE_SIZE // 4, device=tile_ids.device)
    words = torch.stack(keys.words(DrawPurpose.TOKEN, groups), dim=2).flatten(1)  # [n, 64] int64
    excess = exponential_ref(words).scatter_(1, owners[:, None], 0.0)
    return -(minima[:, None] + excess).log_()
