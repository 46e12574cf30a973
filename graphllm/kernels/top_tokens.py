"""The k most likely tokens in a total order: larger logit first, lower token id among equals.

Owns that order. It makes "the top k" one definite set however many tokens tie at its end, so that
filters and reported alternatives do not depend on a sorting routine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphllm.kernels.vocab_tiles import TILE_SIZE, split_into_tiles

_WORD_MASK = 0xFFFFFFFF


def top_tokens_ref(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k tokens of each row: logits [num_rows, k] float32 and ids [num_rows, k] int64.

    logits: [num_rows, vocab] float32 without NaN; 0 <= k <= vocab.

    For small k only k tiles are searched. A token among the first k lies in one of the first k
    tiles by (maximum, lower index): otherwise the maxima of those k tiles would all precede it.
    """
    num_rows, vocab_size = logits.shape
    num_tiles = -(-vocab_size // TILE_SIZE)
    if k > num_tiles // 2:
        ids = torch.arange(vocab_size, device=logits.device)
        keys = _order_keys(logits, ids)  # [num_rows, vocab] int64
    else:
        tiles = split_into_tiles(logits)
        tile_ids = torch.arange(num_tiles, device=logits.device)
        first_tiles = _ids_of(_order_keys(tiles.amax(2), tile_ids).topk(k, dim=1).values)  # [num_rows, k]
        row_starts = torch.arange(num_rows, device=logits.device)[:, None] * num_tiles
        found = tiles.reshape(-1, TILE_SIZE).index_select(0, (row_starts + first_tiles).reshape(-1))
        lanes = torch.arange(TILE_SIZE, device=logits.device)
        ids = (first_tiles[:, :, None] * TILE_SIZE + lanes).reshape(num_rows, k * TILE_SIZE)
        keys = _order_keys(found.reshape(num_rows, k * TILE_SIZE), ids)
    top_ids = _ids_of(keys.topk(k, dim=1).values)
    return logits.gather(1, top_ids), top_ids


def sort_tokens_ref(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Some tokens of each row in order: logits and ids, [num_rows, n] each.

    logits: [num_rows, n] float32 without NaN; ids: their token ids, [num_rows, n] int64, all different.
    """
    order = _order_keys(logits, ids).argsort(dim=1, descending=True)
    return logits.gather(1, order), ids.gather(1, order)


def _order_keys(values: Tensor, ids: Tensor) -> Tensor:
    """One int64 for each (float32 value, id < 2**32), larger for what comes first; all differ."""
    bits = (values + 0.0).view(torch.int32)  # the addition makes -0.0 equal to 0.0
    # Two's complement integers sort as the floats do once a negative float's magnitude is inverted.
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) | (_WORD_MASK - ids)


def _ids_of(keys: Tensor) -> Tensor:
    return _WORD_MASK - (keys & _WORD_MASK)
