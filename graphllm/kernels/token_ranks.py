"""How likely a token is among all, as a number: 1 for the most likely.

    rank = 1 + |{ j : logits_j > logits_token }|

Tokens with equal logits share a rank. NaN counts as -inf and +inf as the largest number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
)
from graphllm.kernels.vocab_tiles import CHUNK_SIZE, without_nan


def token_ranks_ref(logits: Tensor, token_ids: Tensor, *, out: Tensor) -> Tensor:
    """logits: [num_rows, vocab] float32. token_ids: [num_rows] int64. Returns out, [num_rows] int32."""
    largest = torch.finfo(torch.float32).max
    logits = logits.nan_to_num(nan=float("-inf"), posinf=largest, neginf=float("-inf"))
    return out.copy_((logits > logits.gather(1, token_ids[:, None])).sum(1).add_(1))


@triton.jit
def _token_ranks_kernel(
    logits,  # [num_rows, VOCAB]
    token_ids,  # [num_rows]
    ranks,  # [num_rows]
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    release_successor(PDL)
    line = tl.program_id(0).to(tl.int64)
    row = logits + line * VOCAB
    value = without_nan(tl.load(row + tl.load(token_ids + line)))
    larger = tl.zeros((CHUNK,), dtype=tl.int32)
    for first in range(0, VOCAB, CHUNK):
        ids = first + tl.arange(0, CHUNK)
        others = without_nan(tl.load(row + ids, mask=ids < VOCAB, other=float("-inf")))
        larger += (others > value).to(tl.int32)
    tl.store(ranks + line, 1 + tl.sum(larger, 0))


def token_ranks(logits: Tensor, token_ids: Tensor, *, out: Tensor) -> Tensor:
    """See `token_ranks_ref`. The kernel needs `logits` contiguous.

    One program reads a whole row: this is for steps of many rows, which fill a card as they are.
    """
    if not runs_triton(logits):
        return token_ranks_ref(logits, token_ids, out=out)
    num_rows, vocab_size = logits.shape
    assert logits.is_contiguous() and len(token_ids) == len(out) == num_rows
    _token_ranks_kernel[(num_rows,)](
        logits,
        token_ids,
        out,
        VOCAB=vocab_size,
        CHUNK=CHUNK_SIZE,
        num_warps=4,
        **launch_options(logits.device),
    )
    return out
