"""No end before the minimum length.

    x_t <- -inf    for the tokens t that would end a sequence with fewer than min_tokens outputs

Owns nothing but this. The device does it for one row inside `adjusted_logits.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def mask_early_stops_ref(
    logits: Tensor, stop_ids: Tensor, *, output_lengths: Tensor, min_tokens: Tensor
) -> None:
    """Mask stop tokens in `logits` ([num_rows, vocab] float32, contiguous) in place.

    stop_ids: [num_rows, max_stop_ids] int32, -1 where there is none. output_lengths, min_tokens:
    [num_rows] int64.
    """
    is_early = output_lengths < min_tokens
    rows, used = ((stop_ids >= 0) & is_early[:, None]).nonzero(as_tuple=True)
    logits.view(-1)[rows * logits.shape[1] + stop_ids[rows, used]] = float("-inf")


@triton.jit
def mask_early_stops(logits_row, stop_ids_row, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The reference for one row that is too short, in place, by one program.

    WIDTH: the table's; BLOCK: the next power of two.
    """
    columns = tl.arange(0, BLOCK)
    ids = tl.load(stop_ids_row + columns, mask=columns < WIDTH, other=-1)
    tl.store(logits_row + ids, tl.full((BLOCK,), float("-inf"), tl.float32), mask=ids >= 0)
