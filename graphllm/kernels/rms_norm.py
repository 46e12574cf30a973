"""Root-mean-square normalization (Zhang and Sennrich, 2019, arXiv:1910.07467), alone or after a residual add.

    y_i = x_i / sqrt(mean_j(x_j^2) + eps) * weight_i            unit_offset: (1 + weight_i)

The mean and the division run in float32. Where the result is rounded differs between the models, and each is
computed as it was trained: Llama and its like (Mistral, Qwen, SmolLM) round to x's dtype and then multiply by
the weight; Gemma (unit_offset) multiplies by 1 + weight in float32 and then rounds.

`add_rms_norm` first adds a layer's output, times a constant, to the residual stream. Product and sum are
rounded to the residual's dtype, and it is the rounded sum that is normalized, as if all were done apart.

Owns also which rows a tensor has (`token_rows`) and how a row is laid out over warps (`row_layout`), which
`layer_norm.py` shares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.residual_add import scaled, scaled_ref
from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
    widen,
)

# A row lives in the registers of one program: 32 values a thread of 16 warps.
MAX_HIDDEN = 16384
_MAX_WARPS = 16
_VALUES_PER_WARP = 256  # one 16-byte load of bfloat16 for each of 32 threads


def row_layout(hidden: int) -> tuple[int, int]:
    """(tile, num_warps) for a program that normalizes one row of `hidden` values.

    As many warps as one vector load for each thread takes: with few rows (decode) the load's latency is all
    there is, and with many the programs of a multiprocessor cover it for each other.
    """
    assert 0 < hidden <= MAX_HIDDEN, f"rows of {hidden} values"
    tile = max(triton.next_power_of_2(hidden), 32)
    return tile, min(max(tile // _VALUES_PER_WARP, 1), _MAX_WARPS)


@dataclass(frozen=True, slots=True)
class TokenRows:
    """What is normalized: num_heads rows of `hidden` values for each token."""

    num_tokens: int
    num_heads: int
    hidden: int


def token_rows(x: Tensor, out: Tensor, weight: Tensor | None) -> TokenRows:
    """The rows of x, [num_tokens, hidden] or [num_tokens, num_heads, hidden]; a token's lie together."""
    num_tokens, *num_heads, hidden = x.shape
    rows = TokenRows(num_tokens, num_heads[0] if num_heads else 1, hidden)
    for tensor in (x, out):
        assert tensor.ndim <= 3 and tensor[:1].is_contiguous(), "a token's values lie together"
    assert weight is None or weight.shape in ((hidden,), (rows.num_heads, hidden))
    return rows


def rms_norm_ref(
    x: Tensor, weight: Tensor, *, eps: float, unit_offset: bool = False, out: Tensor | None = None
) -> Tensor:
    """x: [..., hidden] of any floating dtype; weight: [hidden], or [num_heads, hidden] for x of [...,
    num_heads, hidden]. Returns out, of x's shape and dtype.

    out may be x itself; without it a new tensor is returned.
    """
    if out is None:
        out = torch.empty_like(x)
    wide = x.float()
    # One reduction without a temporary for the squares, then in place on one number a row.
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # [..., 1] float32
    scale = scale.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    if unit_offset:
        return torch.mul(wide * scale, weight.float() + 1.0, out=out)
    return torch.mul(wide, scale, out=out).mul_(weight)


def add_rms_norm_ref(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float,
    unit_offset: bool = False,
    scale: float = 1.0,
    rows: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """Without rows: residual += scale * x, in place, and out = norm(residual). Returns out.

    With rows: out = norm((scale * x + residual)[rows]), and residual is left as it is: the last norm of a
    model, of which only the sampled tokens are needed.

    x, residual: [num_tokens, hidden] of one dtype; weight: [hidden]; rows: [num_rows] int64, tokens, any
    number of times each; out: [num_tokens or num_rows, hidden] of the same dtype, and may be x without rows.
    """
    if rows is None:
        summed = residual.add_(scaled_ref(x, scale))
    else:
        summed = residual.index_select(0, rows).add_(scaled_ref(x.index_select(0, rows), scale))
    return rms_norm_ref(summed, weight, eps=eps, unit_offset=unit_offset, out=out)


@triton.jit
def _normalize(values, weight, eps, HIDDEN: tl.constexpr, UNIT_OFFSET: tl.constexpr, dtype: tl.constexpr):
    """One row, [TILE] float32 with zeros from HIDDEN on, normalized and multiplied by its weights."""
    normed = values * tl.rsqrt(tl.sum(values * values, axis=0) * (1.0 / HIDDEN) + eps)
    if UNIT_OFFSET:
        return normed * (widen(weight) + 1.0)
    return widen(normed.to(dtype)) * widen(weight)


@triton.jit
def _rms_norm_kernel(
    x,  # [num_tokens, num_heads, HIDDEN]
    weight,  # [HIDDEN], or [num_heads, HIDDEN] where HAS_WEIGHT_PER_HEAD
    out,  # [num_tokens, num_heads, HIDDEN]
    eps,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WEIGHT_PER_HEAD: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    PDL: tl.constexpr,
):
    columns = tl.arange(0, TILE)
    in_row = columns < HIDDEN
    token = tl.program_id(0).to(tl.int64)
    of_head = tl.program_id(1) * HIDDEN + columns
    # A weight: may be read ahead of the wait.
    factors = tl.load(weight + (of_head if HAS_WEIGHT_PER_HEAD else columns), mask=in_row, other=0.0)
    wait_for_predecessor(PDL)
    values = widen(tl.load(x + token * X_STRIDE + of_head, mask=in_row, other=0.0))
    release_successor(PDL)
    dtype: tl.constexpr = out.dtype.element_ty
    normed = _normalize(values, factors, eps, HIDDEN, UNIT_OFFSET, dtype)
    tl.store(out + token * OUT_STRIDE + of_head, normed.to(dtype), mask=in_row)


@triton.jit
def _add_rms_norm_kernel(
    x,  # [num_tokens, HIDDEN]
    residual,  # [num_tokens, HIDDEN], written unless HAS_ROWS
    weight,  # [HIDDEN]
    rows,  # [num_programs] int64 where HAS_ROWS
    out,  # [num_programs, HIDDEN]
    eps,
    SCALE: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    columns = tl.arange(0, TILE)
    in_row = columns < HIDDEN
    factors = tl.load(weight + columns, mask=in_row, other=0.0)  # a weight: may be read ahead of the wait
    wait_for_predecessor(PDL)
    line = tl.program_id(0).to(tl.int64)
    token = tl.load(rows + line) if HAS_ROWS else line
    at = token * HIDDEN + columns
    dtype: tl.constexpr = out.dtype.element_ty
    added = scaled(widen(tl.load(x + at, mask=in_row, other=0.0)), SCALE, dtype)
    summed = added + widen(tl.load(residual + at, mask=in_row, other=0.0))
    release_successor(PDL)
    rounded = summed.to(dtype)
    if not HAS_ROWS:
        tl.store(residual + at, rounded, mask=in_row)
    normed = _normalize(widen(rounded), factors, eps, HIDDEN, UNIT_OFFSET, dtype)
    tl.store(out + line * HIDDEN + columns, normed.to(dtype), mask=in_row)


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, unit_offset: bool = False, out: Tensor | None = None
) -> Tensor:
    """See `rms_norm_ref`. The kernel needs `out`; x: [num_tokens, hidden] or [num_tokens, num_heads, hidden],
    tokens contiguous, at any stride."""
    if not runs_triton(x):
        return rms_norm_ref(x, weight, eps=eps, unit_offset=unit_offset, out=out)
    assert out is not None, "kernels do not allocate"
    assert out.shape == x.shape and out.dtype == x.dtype and weight.is_contiguous()
    rows = token_rows(x, out, weight)
    tile, num_warps = row_layout(rows.hidden)
    _rms_norm_kernel[(rows.num_tokens, rows.num_heads)](
        x,
        weight,
        out,
        eps,
        X_STRIDE=x.stride(0),
        OUT_STRIDE=out.stride(0),
        HIDDEN=rows.hidden,
        TILE=tile,
        HAS_WEIGHT_PER_HEAD=weight.ndim == 2,
        UNIT_OFFSET=unit_offset,
        num_warps=num_warps,
        **launch_options(x.device),
    )
    return out


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float,
    unit_offset: bool = False,
    scale: float = 1.0,
    rows: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """See `add_rms_norm_ref`. The kernel needs all tensors contiguous."""
    if not runs_triton(x):
        return add_rms_norm_ref(
            x, residual, weight, eps=eps, unit_offset=unit_offset, scale=scale, rows=rows, out=out
        )
    num_programs, hidden = out.shape
    assert x.shape == residual.shape and x.shape[-1] == hidden
    assert num_programs == (x.shape[0] if rows is None else rows.shape[0])
    assert x.dtype == residual.dtype == out.dtype
    assert x.is_contiguous() and residual.is_contiguous() and weight.is_contiguous() and out.is_contiguous()
    tile, num_warps = row_layout(hidden)
    _add_rms_norm_kernel[(num_programs,)](
        x,
        residual,
        weight,
        x if rows is None else rows,
        out,
        eps,
        SCALE=scale,
        HIDDEN=hidden,
        TILE=tile,
        UNIT_OFFSET=unit_offset,
        HAS_ROWS=rows is not None,
        num_warps=num_warps,
        **launch_options(x.device),
    )
    return out
