"""Only the tokens that a grammar allows.

    x_t <- -inf    where bit t % 32 of word t // 32 is 0

Owns the meaning of the bits (set is allowed), not where they come from. Kernels apply the mask while
they load a row (`adjusted_logits.py`), so it has no launch of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def apply_bitmask_ref(logits: Tensor, bitmask: Tensor) -> None:
    """Mask `logits` ([num_rows, vocab] float32, contiguous) in place.

    bitmask: [num_rows, ceil(vocab / 32)] int32. A row without a grammar has all bits set (-1).
    Bits at and beyond the vocabulary's end are ignored.
    """
    rows = (bitmask != -1).any(1).nonzero()[:, 0]
    if rows.numel() == 0:
        return
    bits = torch.tensor([1 << i for i in range(31)] + [-(1 << 31)], dtype=torch.int32, device=logits.device)
    is_banned = (bitmask[rows, :, None] & bits) == 0  # [n, num_words, 32] bool
    is_banned = is_banned.flatten(1)[:, : logits.shape[1]]
    logits.index_copy_(0, rows, logits.index_select(0, rows).masked_fill_(is_banned, float("-inf")))


@triton.jit
def is_allowed(bitmask_row, ids, in_vocab):
    """Whether a row's mask allows tokens; ids: int32 of any shape, in_vocab: which of them exist."""
    words = tl.load(bitmask_row + (ids >> 5), mask=in_vocab, other=0)
    return ((words >> (ids & 31)) & 1) != 0
