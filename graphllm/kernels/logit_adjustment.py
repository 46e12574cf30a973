"""What some models do to their logits before anybody reads them.

    y = c tanh(m x / c),  or m x without a softcap c           (soft capping: Gemma 2, arXiv:2408.00118)

Owns nothing of sampling: a request's own changes are `adjusted_logits.py`'s.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
)

_LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))
# Two 16-byte loads for each of 128 threads.
_TILE = 1024
_NUM_WARPS = 4


def adjust_logits_ref(logits: Tensor, *, multiplier: float = 1.0, softcap: float | None = None) -> Tensor:
    """logits: [num_rows, vocab_size] float32, changed in place and returned."""
    if softcap is None:
        return logits.mul_(multiplier) if multiplier != 1.0 else logits
    return logits.mul_(multiplier / softcap).tanh_().mul_(softcap)


@triton.jit
def _adjust_logits_kernel(
    logits,  # [num_rows, VOCAB] float32
    MULTIPLIER: tl.constexpr,
    SOFTCAP: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """SOFTCAP 0 means none."""
    wait_for_predecessor(PDL)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    in_row = columns < VOCAB
    at = logits + tl.program_id(0).to(tl.int64) * VOCAB + columns
    values = tl.load(at, mask=in_row, other=0.0)
    release_successor(PDL)
    if SOFTCAP != 0:
        # tanh(x) = 1 - 2 / (e^2x + 1): right at both infinities, and it has no branch.
        values = SOFTCAP * (1 - 2 / (tl.exp2(values * (2 * MULTIPLIER / SOFTCAP * _LOG2_E)) + 1))
    else:
        values *= MULTIPLIER
    tl.store(at, values, mask=in_row)


def adjust_logits(logits: Tensor, *, multiplier: float = 1.0, softcap: float | None = None) -> Tensor:
    """See `adjust_logits_ref`. The kernel needs logits contiguous; where nothing changes none is launched."""
    if softcap is None and multiplier == 1.0:
        return logits
    if not runs_triton(logits):
        return adjust_logits_ref(logits, multiplier=multiplier, softcap=softcap)
    num_rows, vocab_size = logits.shape
    assert logits.is_contiguous()
    _adjust_logits_kernel[(num_rows, triton.cdiv(vocab_size, _TILE))](
        logits,
        MULTIPLIER=multiplier,
        SOFTCAP=softcap or 0.0,
        VOCAB=vocab_size,
        TILE=_TILE,
        num_warps=_NUM_WARPS,
        **launch_options(logits.device),
    )
    return logits
