"""The rows of logits as requests have adjusted them: penalties, then logit_bias, then min_tokens, then
the grammar's mask.

Owns where an adjusted row lies. A row that nothing adjusts is read where the model left it; only the
others have a copy, in `AdjustedLogits.changed`. The mask is applied while a row is loaded, and so is
the rule for NaN and infinity. The arithmetic is in `penalties.py`, `logit_bias.py`, `min_tokens.py`
and `grammar_bitmask.py`, whose references are this file's too.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.grammar_bitmask import is_allowed
from graphllm.kernels.logit_bias import add_biases
from graphllm.kernels.min_tokens import mask_early_stops
from graphllm.kernels.penalties import penalize_history
from graphllm.kernels.sampled_rows import (
    FREQUENCY_PENALTY,
    MIN_TOKENS,
    NUM_BIASES,
    NUM_PROMPT_TOKENS,
    PRESENCE_PENALTY,
    REPETITION_PENALTY,
    SampledRows,
    line_of,
    load_float,
    load_int,
)
from graphllm.kernels.triton_support import launch_options, release_successor, wait_for_predecessor
from graphllm.kernels.vocab_tiles import CHUNK_SIZE, num_chunks, without_nan

_HISTORY_BLOCK = 2048


@dataclass(frozen=True, slots=True)
class AdjustedLogits:
    """logits: [num_lines, vocab] float32, as the model left them. changed: [num_pairs, vocab] float32,
    in use for the rows that `is_adjusted`. masks: [num_pairs, ceil(vocab / 32)] int32, or None."""

    logits: Tensor
    changed: Tensor
    masks: Tensor | None

    @property
    def vocab_size(self) -> int:
        return self.logits.shape[1]

    @property
    def masks_or_any(self) -> Tensor:
        """`masks`, or a pointer that a kernel compiled without masks does not read."""
        return self.logits if self.masks is None else self.masks


@triton.jit
def has_penalties(floats, slot):
    """Whether a slot's penalties change anything."""
    return (
        (load_float(floats, slot, REPETITION_PENALTY) != 1.0)
        | (load_float(floats, slot, PRESENCE_PENALTY) != 0.0)
        | (load_float(floats, slot, FREQUENCY_PENALTY) != 0.0)
    )


@triton.jit
def is_too_short(ints, slot, length):
    """Whether min_tokens holds back the stop tokens of a slot with `length` tokens."""
    return length - load_int(ints, slot, NUM_PROMPT_TOKENS) < load_int(ints, slot, MIN_TOKENS)


@triton.jit
def is_adjusted(floats, ints, lengths, slot):
    """Whether a slot's row of logits has a copy of its own."""
    has_biases = load_int(ints, slot, NUM_BIASES) > 0
    return has_penalties(floats, slot) | has_biases | is_too_short(ints, slot, tl.load(lengths + slot))


@triton.jit
def load_adjusted(
    logits_row, changed_row, masks_row, ids, adjusted, VOCAB: tl.constexpr, HAS_MASKS: tl.constexpr
):
    """A row's adjusted logits for `ids` (int32, any shape): float32 without NaN, -inf beyond its end."""
    in_vocab = ids < VOCAB
    if adjusted:
        values = tl.load(changed_row + ids, mask=in_vocab, other=float("-inf"))
    else:
        values = without_nan(tl.load(logits_row + ids, mask=in_vocab, other=float("-inf")))
    if HAS_MASKS:
        values = tl.where(is_allowed(masks_row, ids, in_vocab), values, float("-inf"))
    return values


@triton.jit
def _copy_adjusted_kernel(
    logits,
    changed,
    lines,
    slots,
    floats,
    ints,
    lengths,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    release_successor(PDL)
    pair = tl.program_id(1)
    if is_adjusted(floats, ints, lengths, tl.load(slots + pair)):
        row = logits + line_of(lines, pair, HAS_LINES) * VOCAB
        ids = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
        in_vocab = ids < VOCAB
        values = without_nan(tl.load(row + ids, mask=in_vocab, other=float("-inf")))
        tl.store(changed + pair.to(tl.int64) * VOCAB + ids, values, mask=in_vocab)


@triton.jit(do_not_specialize=["table_width"])
def _adjust_kernel(
    logits,
    changed,
    lines,
    slots,
    floats,
    ints,
    lengths,
    token_table,
    bias_ids,
    bias_values,
    stop_ids,
    table_width,
    VOCAB: tl.constexpr,
    MAX_BIASES: tl.constexpr,
    BIAS_BLOCK: tl.constexpr,
    MAX_STOPS: tl.constexpr,
    STOP_BLOCK: tl.constexpr,
    HISTORY_BLOCK: tl.constexpr,
    HAS_LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    release_successor(PDL)
    pair = tl.program_id(0)
    slot = tl.load(slots + pair)
    length = tl.load(lengths + slot)
    changed_row = changed + pair.to(tl.int64) * VOCAB
    if has_penalties(floats, slot):
        penalize_history(
            changed_row,
            logits + line_of(lines, pair, HAS_LINES) * VOCAB,
            token_table + slot * table_width,
            length.to(tl.int32),
            load_int(ints, slot, NUM_PROMPT_TOKENS).to(tl.int32),
            load_float(floats, slot, REPETITION_PENALTY),
            load_float(floats, slot, PRESENCE_PENALTY),
            load_float(floats, slot, FREQUENCY_PENALTY),
            HISTORY_BLOCK,
        )
        tl.debug_barrier()
    num_biases = load_int(ints, slot, NUM_BIASES)
    if num_biases > 0:
        rows = slot * MAX_BIASES
        add_biases(changed_row, bias_ids + rows, bias_values + rows, num_biases, BIAS_BLOCK)
        tl.debug_barrier()
    if is_too_short(ints, slot, length):
        mask_early_stops(changed_row, stop_ids + slot * MAX_STOPS, MAX_STOPS, STOP_BLOCK)


def adjust_logits(
    adjusted: AdjustedLogits,
    rows: SampledRows,
    *,
    token_table: Tensor,
    bias_ids: Tensor,
    bias_values: Tensor,
    stop_ids: Tensor,
) -> AdjustedLogits:
    """Fill `adjusted.changed` for the rows that need it; two launches, which leave all other rows alone.

    token_table: [num_slots, width] int32, the slots' tokens. bias_ids: [num_slots, max_biases] int32
    and bias_values, the same in float32; stop_ids: [num_slots, max_stops] int32, -1 for none.
    A kernel only: without one the caller takes the references of the operations.
    """
    vocab_size = adjusted.vocab_size
    has_lines = rows.lines is not None
    tables = (rows.lines_or_any, rows.slots, rows.floats, rows.ints, rows.lengths)
    _copy_adjusted_kernel[(num_chunks(vocab_size), rows.num_pairs)](
        adjusted.logits,
        adjusted.changed,
        *tables,
        VOCAB=vocab_size,
        CHUNK=CHUNK_SIZE,
        HAS_LINES=has_lines,
        num_warps=4,
        **launch_options(adjusted.logits.device),
    )
    _adjust_kernel[(rows.num_pairs,)](
        adjusted.logits,
        adjusted.changed,
        *tables,
        token_table,
        bias_ids,
        bias_values,
        stop_ids,
        token_table.shape[1],
        VOCAB=vocab_size,
        MAX_BIASES=bias_ids.shape[1],
        BIAS_BLOCK=triton.next_power_of_2(bias_ids.shape[1]),
        MAX_STOPS=stop_ids.shape[1],
        STOP_BLOCK=triton.next_power_of_2(stop_ids.shape[1]),
        HISTORY_BLOCK=_HISTORY_BLOCK,
        HAS_LINES=has_lines,
        num_warps=8,
        # A product and a difference rounded as one would not be the reference's.
        enable_fp_fusion=False,
        **launch_options(adjusted.logits.device),
    )
    return adjusted
