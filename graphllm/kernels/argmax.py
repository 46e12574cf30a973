"""The greedy choice.

    token = min { i : logits_i = max_j logits_j }

Owns nothing but this. Logits hold no NaN for the reference; the kernel takes NaN as -inf and +inf as
the largest number. A row of nothing but -inf gives token 0. The kernel leaves a key for each chunk of
the vocabulary, and `chosen_tokens.py` takes the largest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.sampled_rows import SampledRows, line_of
from graphllm.kernels.top_tokens import best_key
from graphllm.kernels.triton_support import launch_options, release_successor, wait_for_predecessor
from graphllm.kernels.vocab_tiles import CHUNK_SIZE, TILE_SIZE, num_chunks, split_into_tiles, without_nan


def argmax_ref(logits: Tensor) -> Tensor:
    """The most likely token of each row, the lowest id among equals: [num_rows] int64.

    logits: [num_rows, vocab] float32 without NaN. Equal to `logits.argmax(1)`, which is not
    vectorised on a CPU: maxima of tiles are, and argmax then sees one tile in full.
    """
    tiles = split_into_tiles(logits)
    best_tiles = tiles.amax(2).argmax(1)  # [num_rows] int64; argmax gives the first of equals
    rows = torch.arange(logits.shape[0], device=logits.device)
    return best_tiles * TILE_SIZE + tiles[rows, best_tiles].argmax(1)


@triton.jit
def _chunk_argmax_kernel(
    logits,
    lines,
    chunk_best,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    HAS_LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    release_successor(PDL)
    chunk = tl.program_id(0)
    pair = tl.program_id(1)
    row = logits + line_of(lines, pair, HAS_LINES) * VOCAB
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    values = without_nan(tl.load(row + ids, mask=ids < VOCAB, other=float("-inf")))
    tl.store(chunk_best + pair * NUM_CHUNKS + chunk, best_key(values, ids))


def chunk_argmax(logits: Tensor, rows: SampledRows, *, out: Tensor) -> Tensor:
    """The best token of each chunk of each pair's row, as a token key.

    logits: [num_lines, vocab] float32. out: [num_pairs, num_chunks] int64. A kernel only: without one
    the caller takes `argmax_ref`.
    """
    vocab_size = logits.shape[1]
    _chunk_argmax_kernel[(num_chunks(vocab_size), rows.num_pairs)](
        logits,
        rows.lines_or_any,
        out,
        VOCAB=vocab_size,
        CHUNK=CHUNK_SIZE,
        NUM_CHUNKS=num_chunks(vocab_size),
        HAS_LINES=rows.lines is not None,
        num_warps=4,
        **launch_options(logits.device),
    )
    return out
