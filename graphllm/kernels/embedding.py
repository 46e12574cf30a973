"""The embedding of tokens: a row of a matrix for each.

    y_t = weight[token_ids_t] * scale

Gemma's scale is rounded to the weight's dtype and so is the product; without a scale rows are copied.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
    widen,
)

# One 16-byte load of bfloat16 for each thread, and several programs for a single token's row.
_MAX_TILE = 1024
_VALUES_PER_WARP = 256


def embedding_ref(token_ids: Tensor, weight: Tensor, *, out: Tensor, scale: float | None = None) -> Tensor:
    """token_ids: [num_tokens] int64; weight: [vocab, hidden]; out: [num_tokens, hidden], returned.

    Raises IndexError for a token outside the vocabulary (the kernel has no way to).
    """
    torch.index_select(weight, 0, token_ids, out=out)
    return out if scale is None else out.mul_(_rounded(scale, weight.dtype))


@functools.cache
def _rounded(scale: float, dtype: torch.dtype) -> float:
    return torch.tensor(scale, dtype=dtype, device="cpu").item()


@triton.jit
def _embedding_kernel(
    token_ids,  # [num_tokens] int64
    weight,  # [vocab, HIDDEN]
    out,  # [num_tokens, HIDDEN]
    scale,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    line = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ids + line)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    in_row = columns < HIDDEN
    values = tl.load(weight + token * HIDDEN + columns, mask=in_row, other=0.0)
    release_successor(PDL)
    if HAS_SCALE:
        values = (widen(values) * scale).to(out.dtype.element_ty)
    tl.store(out + line * HIDDEN + columns, values, mask=in_row)


def embedding(token_ids: Tensor, weight: Tensor, *, out: Tensor, scale: float | None = None) -> Tensor:
    """See `embedding_ref`. The kernel needs all tensors contiguous, and every token in the vocabulary."""
    if not runs_triton(weight):
        return embedding_ref(token_ids, weight, out=out, scale=scale)
    num_tokens, hidden = out.shape
    assert token_ids.shape == (num_tokens,) and weight.shape[1] == hidden and weight.dtype == out.dtype
    assert token_ids.is_contiguous() and weight.is_contiguous() and out.is_contiguous()
    tile = min(triton.next_power_of_2(hidden), _MAX_TILE)
    _embedding_kernel[(num_tokens, triton.cdiv(hidden, tile))](
        token_ids,
        weight,
        out,
        1.0 if scale is None else _rounded(scale, weight.dtype),
        HIDDEN=hidden,
        TILE=tile,
        HAS_SCALE=scale is not None,
        num_warps=max(tile // _VALUES_PER_WARP, 1),
        **launch_options(weight.device),
    )
    return out
