"""Sampling of one step in kernels: what a captured graph replays.

Owns the order of the launches and their scratch memory. Everything that differs between rows is read
from device memory inside the kernels, so one sequence of launches serves any mixture, and a row that
needs less costs little. `sampler.py` has the specification and the parameter tables; tokens are equal
to its tokens, but for two candidates closer than float32 rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphllm.arena import Arena
from graphllm.kernels.adjusted_logits import AdjustedLogits, adjust_logits
from graphllm.kernels.argmax import chunk_argmax
from graphllm.kernels.chosen_tokens import chosen_tokens
from graphllm.kernels.filter_thresholds import NUM_CANDIDATES, filter_thresholds
from graphllm.kernels.gumbel_draw import gumbel_draw
from graphllm.kernels.logprobs import write_logprobs
from graphllm.kernels.row_maxima import RowMaxima, row_maxima
from graphllm.kernels.sampled_rows import SampledRows
from graphllm.kernels.triton_support import runs_triton
from graphllm.kernels.vocab_tiles import num_chunks, num_tiles
from graphllm.runner.sampler import SamplerKind, SamplerVariant, SamplingTables, sample
from graphllm.sampling_params import MAX_LOGPROBS


@dataclass(frozen=True, slots=True)
class SampleResults:
    """Where sampled tokens go, a line for each pair of the largest step: token_ids [num_lines] int64,
    logprobs [num_lines] float32, top_ids [num_lines, 20] int64 and top_logprobs [num_lines, 20] float32,
    most likely first. Logprobs are those of the model, and are written by SamplerKind.LOGPROBS only."""

    token_ids: Tensor
    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    @classmethod
    def allocate(cls, num_lines: int, *, device: torch.device) -> SampleResults:
        return cls(
            token_ids=torch.zeros(num_lines, dtype=torch.int64, device=device),
            logprobs=torch.zeros(num_lines, dtype=torch.float32, device=device),
            top_ids=torch.zeros(num_lines, MAX_LOGPROBS, dtype=torch.int64, device=device),
            top_logprobs=torch.zeros(num_lines, MAX_LOGPROBS, dtype=torch.float32, device=device),
        )


def sample_on_device(
    logits: Tensor,
    *,
    slots: Tensor,
    tables: SamplingTables,
    kind: SamplerKind,
    token_table: Tensor,
    lengths: Tensor,
    results: SampleResults,
    arena: Arena,
    masks: Tensor | None = None,
    lines: Tensor | None = None,
) -> None:
    """Sample a token for each pair, into `token_table[slot, lengths[slot]]` and `results`.

    logits: [num_lines, vocab] float32, contiguous, left as they are. slots: [num_pairs] int64.
    token_table: [num_slots, width] int32; lengths: [num_slots] int64, below the width: the position of
    the token now sampled. lines: [num_pairs] int64, the line of logits that pair i reads and of results
    that it writes; None means line i. masks: [num_pairs, ceil(vocab / 32)] int32, a set bit allows a
    token, with GENERAL and LOGPROBS. Pairs of one slot, or of one line, must be padding: whichever comes
    last stays.

    NaN, infinities and rows in which nothing is left are as in `sample`. Reads nothing of the device on
    the host and allocates nothing: scratch comes from `arena`, under names that begin with "sampler_".
    Without kernels (`runs_triton`) the reference fills the same places.
    """
    assert masks is None or kind is not SamplerKind.GREEDY, "the greedy sampler knows no masks"
    if not runs_triton(logits):
        sample_by_reference(
            logits,
            slots=slots,
            tables=tables,
            variant=_widest_variant(kind),
            token_table=token_table,
            lengths=lengths,
            results=results,
            masks=masks,
            lines=lines,
        )
        return
    rows = SampledRows(slots=slots, lines=lines, floats=tables.floats, ints=tables.ints, lengths=lengths)
    if kind is SamplerKind.GREEDY:
        chunk_keys = arena.take(
            "sampler_best", rows.num_pairs, num_chunks(logits.shape[1]), dtype=torch.int64
        )
        chunk_argmax(logits, rows, out=chunk_keys)
    else:
        chunk_keys = _draw(logits, rows, tables=tables, token_table=token_table, arena=arena, masks=masks)
    chosen_tokens(chunk_keys, logits, rows=rows, token_table=token_table, out=results.token_ids)
    if kind is SamplerKind.LOGPROBS:
        _report_logprobs(logits, rows, results=results, arena=arena)


def _draw(
    logits: Tensor,
    rows: SampledRows,
    *,
    tables: SamplingTables,
    token_table: Tensor,
    arena: Arena,
    masks: Tensor | None,
) -> Tensor:
    """The best token of each chunk of each row, as all parameters want it: [num_pairs, num_chunks] int64."""
    num_pairs, vocab_size = rows.num_pairs, logits.shape[1]
    chunks, tiles = num_chunks(vocab_size), num_tiles(vocab_size)
    adjusted = AdjustedLogits(
        logits, arena.take("sampler_work", num_pairs, vocab_size, dtype=torch.float32), masks
    )
    adjust_logits(
        adjusted,
        rows,
        token_table=token_table,
        bias_ids=tables.bias_ids,
        bias_values=tables.bias_values,
        stop_ids=tables.stop_ids,
    )
    maxima = RowMaxima(
        best=arena.take("sampler_best", num_pairs, chunks, dtype=torch.int64),
        masses=arena.take("sampler_masses", num_pairs, chunks, dtype=torch.float32),
        tiles=arena.take("sampler_tile_maxima", num_pairs, tiles, dtype=torch.float32),
    )
    row_maxima(adjusted, rows, out=maxima)
    thresholds = filter_thresholds(
        adjusted,
        rows,
        maxima,
        tile_lists=arena.take("sampler_tile_lists", num_pairs, tiles, dtype=torch.int32),
        candidates=arena.take("sampler_candidates", num_pairs, NUM_CANDIDATES, dtype=torch.int32),
        out=arena.take("sampler_thresholds", num_pairs, 2, dtype=torch.int32),
    )
    drawn = arena.take("sampler_drawn", num_pairs, chunks, dtype=torch.int64)
    return gumbel_draw(adjusted, rows, maxima, thresholds=thresholds, out=drawn)


def _report_logprobs(logits: Tensor, rows: SampledRows, *, results: SampleResults, arena: Arena) -> None:
    size = rows.num_pairs, num_chunks(logits.shape[1])
    write_logprobs(
        logits,
        rows,
        chunk_top_keys=arena.take("sampler_top_keys", *size, MAX_LOGPROBS, dtype=torch.int64),
        chunk_masses=arena.take("sampler_masses", *size, dtype=torch.float32),
        token_ids=results.token_ids,
        out=(results.logprobs, results.top_ids, results.top_logprobs),
    )


def sample_by_reference(
    logits: Tensor,
    *,
    slots: Tensor,
    tables: SamplingTables,
    variant: SamplerVariant,
    token_table: Tensor,
    lengths: Tensor,
    results: SampleResults,
    masks: Tensor | None = None,
    lines: Tensor | None = None,
) -> None:
    """`sample_on_device` by the specification, for exactly the operations of `variant`."""
    if lines is None:
        lines = torch.arange(slots.numel(), device=slots.device)
    sampled = sample(
        logits[lines],
        slots=slots,
        tables=tables,
        variant=variant,
        token_table=token_table,
        lengths=lengths,
        mask=masks,
    )
    token_table[slots, lengths[slots]] = sampled.token_ids.to(token_table.dtype)
    results.token_ids[lines] = sampled.token_ids
    if sampled.logprobs is None or sampled.top_ids is None or sampled.top_logprobs is None:
        return
    results.logprobs[lines] = sampled.logprobs
    # A vocabulary of fewer than 20 tokens leaves the last columns without one.
    width = sampled.top_ids.shape[1]
    results.top_ids[lines, :width] = sampled.top_ids
    results.top_logprobs[lines, :width] = sampled.top_logprobs
    results.top_ids[lines, width:] = 0
    results.top_logprobs[lines, width:] = float("-inf")


def _widest_variant(kind: SamplerKind) -> SamplerVariant:
    """Everything that a captured sampler of this kind is ready for."""
    is_general = kind is not SamplerKind.GREEDY
    return SamplerVariant(
        penalties=is_general,
        bias=is_general,
        random=is_general,
        filters=is_general,
        num_logprobs=MAX_LOGPROBS if kind is SamplerKind.LOGPROBS else None,
    )
