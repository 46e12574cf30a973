"""The k most likely tokens in a total order: larger logit first, lower token id among equals.

Owns that order, for torch and for kernels. It makes "the top k" one definite set however many tokens
tie at its end, so that filters and reported alternatives do not depend on a sorting routine.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.vocab_tiles import TILE_SIZE, split_into_tiles

_WORD_MASK = 0xFFFFFFFF

_ID_MASK: tl.constexpr = tl.constexpr(_WORD_MASK)
LOWEST_ORDER: tl.constexpr = tl.constexpr(-(2**31) + 0x7FFFFF)
"""`order_of(-inf)`: nothing that may be sampled is as low."""


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


@triton.jit
def order_of(values):
    """int32 integers that compare as float32 values do; 0.0 and -0.0 are equal. No NaN."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(orders):
    """The float32 values that have these orders."""
    return (orders ^ ((orders >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def token_key(values, ids):
    """int64 keys, the larger the earlier in the total order; ids: int32."""
    return (order_of(values).to(tl.int64) << 32) | (_ID_MASK - ids.to(tl.int64))


@triton.jit
def value_of_key(keys):
    """The float32 values in token keys."""
    return value_of((keys >> 32).to(tl.int32))


@triton.jit
def id_of_key(keys):
    """The token ids in token keys; int64."""
    return _ID_MASK - (keys & _ID_MASK)


@triton.jit
def best_key(values, ids):
    """The key of the first token of a block. values: [n] float32 without NaN, ids: [n] int32, ascending.

    Two reductions of 32 bits cost less than one of 64.
    """
    best = tl.max(values, 0)
    return token_key(best, tl.min(tl.where(values == best, ids, 0x7FFFFFFF), 0))
