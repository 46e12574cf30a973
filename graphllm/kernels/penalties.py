"""Repetition, frequency and presence penalties.

For a token seen in the prompt or the output (repetition; Keskar et al., "CTRL", 2019), and then for
its count c in the output alone (frequency and presence, as the OpenAI API defines them):

    x <- x / repetition  if x > 0  else  x * repetition
    x <- x - frequency * c - presence * [c > 0]

Owns the arithmetic. The counts are taken from the token history where it lies, so no table of
slots times vocabulary exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """Each row's penalties, three tensors [num_rows] float32; 1, 0 and 0 change nothing.

    repetition is at least the smallest normal float32.
    """

    repetition: Tensor
    presence: Tensor
    frequency: Tensor


def apply_penalties_ref(
    logits: Tensor,
    penalties: Penalties,
    *,
    token_table: Tensor,
    slots: Tensor,
    lengths: Tensor,
    prompt_lengths: Tensor,
) -> None:
    """Penalize `logits` ([num_rows, vocab] float32, contiguous) in place.

    token_table: [num_slots, max_len] int32 or int64; row `slots[i]` ([num_rows] int64) holds the
    history of logits row i: `lengths[i]` tokens ([num_rows] int64), the first `prompt_lengths[i]`
    of them the prompt. What lies beyond the length is never used. -inf stays -inf, nothing becomes
    NaN, and nothing exceeds the largest float32.
    """
    active = (penalties.repetition != 1.0) | (penalties.presence != 0.0) | (penalties.frequency != 0.0)
    rows = (active & (lengths > 0)).nonzero()[:, 0]  # [n] int64
    if rows.numel() == 0:
        return
    lengths = lengths[rows, None]
    max_length = int(lengths.max())
    history = token_table[:, :max_length].index_select(0, slots[rows]).to(torch.int64)  # [n, max_length]
    columns = torch.arange(max_length, device=logits.device)
    # Beyond its length a row repeats its first token, whose new logit is then written once more.
    history = torch.where(columns < lengths, history, history[:, :1])
    is_output = (columns >= prompt_lengths[rows, None]) & (columns < lengths)

    vocab_size = logits.shape[1]
    counts = torch.zeros(rows.numel(), vocab_size, device=logits.device)
    counts.scatter_add_(1, history, is_output.to(torch.float32))
    seen_counts = counts.gather(1, history)  # [n, max_length]

    flat_logits = logits.view(-1)
    flat_index = rows[:, None] * vocab_size + history
    seen = flat_logits[flat_index]
    repetition = penalties.repetition[rows, None]
    seen = torch.where(seen > 0, seen / repetition, seen * repetition)
    seen -= penalties.frequency[rows, None] * seen_counts
    seen -= penalties.presence[rows, None] * (seen_counts > 0)
    flat_logits[flat_index] = seen.clamp_(max=torch.finfo(torch.float32).max)
