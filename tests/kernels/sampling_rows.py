"""Rows of sampling parameters for kernel tests, without the runner's tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphllm.kernels.adjusted_logits import AdjustedLogits
from graphllm.kernels.row_maxima import RowMaxima
from graphllm.kernels.sampled_rows import NUM_FLOATS, NUM_INTS, FloatColumn, IntColumn, SampledRows
from graphllm.kernels.vocab_tiles import num_chunks, num_tiles
from tests.kernels.device import DEVICE

_NEUTRAL = {FloatColumn.TEMPERATURE: 1.0, FloatColumn.TOP_P: 1.0, FloatColumn.REPETITION_PENALTY: 1.0}


def make_rows(
    num_pairs: int,
    *,
    float_columns: dict[FloatColumn, Sequence[float]] | None = None,
    int_columns: dict[IntColumn, Sequence[int]] | None = None,
    lengths: Sequence[int] | None = None,
    lines: Sequence[int] | None = None,
) -> SampledRows:
    """Pair i has slot `num_pairs - 1 - i`; each column's values are in the order of pairs.

    What is not named is neutral: temperature 1, nothing adjusted, nothing filtered.
    """
    floats = torch.zeros(num_pairs, NUM_FLOATS)
    ints = torch.zeros(num_pairs, NUM_INTS, dtype=torch.int64)
    for column, value in _NEUTRAL.items():
        floats[:, column] = value
    for float_column, numbers in (float_columns or {}).items():
        floats[:, float_column] = torch.tensor(numbers)
    for int_column, integers in (int_columns or {}).items():
        ints[:, int_column] = torch.tensor(integers)
    return SampledRows(
        slots=torch.arange(num_pairs - 1, -1, -1, device=DEVICE),
        lines=None if lines is None else torch.tensor(lines, device=DEVICE),
        floats=floats.flip(0).to(DEVICE),
        ints=ints.flip(0).to(DEVICE),
        lengths=torch.tensor(lengths if lengths is not None else [0] * num_pairs).flip(0).to(DEVICE),
    )


def unadjusted(logits: torch.Tensor, masks: torch.Tensor | None = None) -> AdjustedLogits:
    """Rows that are read where the model left them; their copies are NaN, which nobody may read."""
    changed = torch.full_like(logits, float("nan"))
    return AdjustedLogits(logits.to(DEVICE), changed.to(DEVICE), None if masks is None else masks.to(DEVICE))


def empty_maxima(num_pairs: int, vocab_size: int) -> RowMaxima:
    chunks = num_chunks(vocab_size)
    return RowMaxima(
        best=torch.empty(num_pairs, chunks, dtype=torch.int64, device=DEVICE),
        masses=torch.full((num_pairs, chunks), float("nan"), device=DEVICE),
        tiles=torch.full((num_pairs, num_tiles(vocab_size)), float("nan"), device=DEVICE),
    )
