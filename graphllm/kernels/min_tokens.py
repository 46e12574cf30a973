"""No end before the minimum length.

    x_t <- -inf    for the tokens t that would end a sequence with fewer than min_tokens outputs

Owns nothing but this.
"""

from __future__ import annotations

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
