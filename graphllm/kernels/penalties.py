"""Repetition, frequency and presence penalties.

For a token seen in the prompt or the output (repetition; Keskar et al., "CTRL", 2019), and then for
its count c in the output alone (frequency and presence, as the OpenAI API defines them):

    x <- x / repetition  if x > 0  else  x * repetition
    x <- x - frequency * c - presence * [c > 0]

Owns the arithmetic. The counts are taken from the token history where it lies, so no table of
slots times vocabulary exists. The device does it for one row inside `adjusted_logits.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.vocab_tiles import without_nan

# A quiet NaN's bits: above those of every number, with 22 bits below for a count.
_ZERO_COUNT: tl.constexpr = tl.constexpr(0x7FC00000)
_LARGEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).max)


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


@triton.jit
def penalize_history(
    changed_row,
    logits_row,
    history,
    length,
    prompt_length,
    repetition,
    presence,
    frequency,
    BLOCK: tl.constexpr,
):
    """The reference for one row, by one program.

    changed_row: the row to be written, float32; logits_row: the row as the model left it. history:
    the slot's tokens, of which `length` (at most 2**22, int32 as is `prompt_length`) count.

    The counts live in the row itself while they are needed, as NaNs that carry a number: each seen
    token's place is set to a count of zero, outputs are counted, and whoever still finds a count in
    its place puts the penalized logit there. Several of one token write the same.
    """
    counts = changed_row.to(tl.pointer_type(tl.int32), bitcast=True)
    columns = tl.arange(0, BLOCK)
    for start in range(0, length, BLOCK):
        seen = start + columns < length
        tokens = tl.load(history + start + columns, mask=seen, other=0)
        tl.store(counts + tokens, tl.full((BLOCK,), _ZERO_COUNT, tl.int32), mask=seen)
    tl.debug_barrier()
    for start in range(prompt_length, length, BLOCK):
        seen = start + columns < length
        tokens = tl.load(history + start + columns, mask=seen, other=0)
        tl.atomic_add(counts + tokens, tl.full((BLOCK,), 1, tl.int32), mask=seen, sem="relaxed")
    tl.debug_barrier()
    for start in range(0, length, BLOCK):
        seen = start + columns < length
        tokens = tl.load(history + start + columns, mask=seen, other=0)
        bits = tl.load(counts + tokens, mask=seen, other=0, cache_modifier=".cg")
        is_open = bits >= _ZERO_COUNT
        count = tl.where(is_open, bits - _ZERO_COUNT, 0)
        logits = without_nan(tl.load(logits_row + tokens, mask=is_open, other=0.0))
        logits = tl.where(logits > 0, tl.div_rn(logits, repetition), logits * repetition)
        logits = logits - frequency * count.to(tl.float32)
        logits = logits - tl.where(count > 0, presence, 0.0)
        tl.store(changed_row + tokens, tl.minimum(logits, _LARGEST), mask=is_open)
