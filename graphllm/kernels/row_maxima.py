"""What the choice of a token wants to know of a row beforehand, chunk by chunk of the vocabulary.

    best_c  = the first token of chunk c in the total order
    mass_c  = sum over the chunk of exp((x - max of the chunk) / temperature)
    tile_t  = max over tile t of x

with x the adjusted logits. Owns nothing but these. The greedy choice is the largest of the best; the
masses give top_p its whole, and are taken for the rows that need one; the tile maxima tell the filters
where to look. Their reference is one line of torch each, in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.adjusted_logits import AdjustedLogits, is_adjusted, load_adjusted
from graphllm.kernels.sampled_rows import (
    TEMPERATURE,
    TOP_K,
    TOP_P,
    SampledRows,
    line_of,
    load_float,
    load_int,
)
from graphllm.kernels.top_tokens import best_key, value_of_key
from graphllm.kernels.triton_support import launch_options, release_successor, wait_for_predecessor
from graphllm.kernels.vocab_tiles import CHUNK_SIZE, TILE_SIZE, num_chunks, num_tiles

_SMALLEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).min)


@dataclass(frozen=True, slots=True)
class RowMaxima:
    """best: [num_pairs, num_chunks] int64 token keys. masses: [num_pairs, num_chunks] float32, defined
    for the rows with top_p and without top_k. tiles: [num_pairs, num_tiles] float32."""

    best: Tensor
    masses: Tensor
    tiles: Tensor


@triton.jit
def is_limited_by_count(ints, slot, VOCAB: tl.constexpr):
    """Whether top_k leaves out anything."""
    top_k = load_int(ints, slot, TOP_K)
    return (top_k > 0) & (top_k < VOCAB)


@triton.jit
def row_maximum(best, pair, NUM_CHUNKS: tl.constexpr, CHUNKS_PADDED: tl.constexpr):
    """The largest adjusted logit of a row, from the chunks' best; float32."""
    chunks = tl.arange(0, CHUNKS_PADDED)
    keys = tl.load(best + pair * NUM_CHUNKS + chunks, mask=chunks < NUM_CHUNKS, other=-(2**63))
    return value_of_key(tl.max(keys, 0))


@triton.jit
def tempered(values, maximum, temperature):
    """Logits after temperature, 0 for the maximum; rounded as the reference's. -inf stays -inf."""
    return tl.div_rn(values - tl.maximum(maximum, _SMALLEST), temperature)


@triton.jit
def _row_maxima_kernel(
    logits,
    changed,
    masks,
    lines,
    slots,
    floats,
    ints,
    lengths,
    best,
    masses,
    tile_maxima,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    HAS_LINES: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    release_successor(PDL)
    chunk = tl.program_id(0)
    pair = tl.program_id(1)
    slot = tl.load(slots + pair)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    values = load_adjusted(
        logits + line_of(lines, pair, HAS_LINES) * VOCAB,
        changed + pair.to(tl.int64) * VOCAB,
        masks + pair * ((VOCAB + 31) // 32),
        ids,
        is_adjusted(floats, ints, lengths, slot),
        VOCAB,
        HAS_MASKS,
    )
    key = best_key(values, ids)
    tl.store(best + pair * NUM_CHUNKS + chunk, key)
    temperature = load_float(floats, slot, TEMPERATURE)
    if temperature > 0:
        tiles = chunk * (CHUNK // TILE) + tl.arange(0, CHUNK // TILE)
        maxima = tl.max(tl.reshape(values, (CHUNK // TILE, TILE)), 1)
        tl.store(tile_maxima + pair * NUM_TILES + tiles, maxima, mask=tiles < NUM_TILES)
        wants_mass = load_float(floats, slot, TOP_P) < 1.0
        if wants_mass & (not is_limited_by_count(ints, slot, VOCAB)):
            mass = tl.sum(tl.exp(tempered(values, value_of_key(key), temperature)), 0)
            tl.store(masses + pair * NUM_CHUNKS + chunk, mass)


def row_maxima(adjusted: AdjustedLogits, rows: SampledRows, *, out: RowMaxima) -> RowMaxima:
    """Fill `out` for every pair. A kernel only."""
    vocab_size = adjusted.vocab_size
    chunks = num_chunks(vocab_size)
    _row_maxima_kernel[(chunks, rows.num_pairs)](
        adjusted.logits,
        adjusted.changed,
        adjusted.masks_or_any,
        rows.lines_or_any,
        rows.slots,
        rows.floats,
        rows.ints,
        rows.lengths,
        out.best,
        out.masses,
        out.tiles,
        VOCAB=vocab_size,
        CHUNK=CHUNK_SIZE,
        TILE=TILE_SIZE,
        NUM_CHUNKS=chunks,
        NUM_TILES=num_tiles(vocab_size),
        HAS_LINES=rows.lines is not None,
        HAS_MASKS=adjusted.masks is not None,
        num_warps=4,
        **launch_options(adjusted.logits.device),
    )
    return out
