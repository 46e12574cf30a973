"""Layer normalization (Ba et al., 2016, arXiv:1607.06450), alone or after a residual add.

    y_i = (x_i - mean_j(x_j)) / sqrt(mean_j((x_j - mean)^2) + eps) * weight_i + bias_i

A missing weight is 1, a missing bias 0. All of it runs in float32 and is rounded once, at the end. The
variance is taken of the centered values: the difference of two means would lose small variances.

`add_layer_norm` first adds a layer's output, times a constant, to the residual stream. Product and sum are
rounded to the residual's dtype, and it is the rounded sum that is normalized, as if all were done apart.
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.residual_add import scaled, scaled_ref
from graphllm.kernels.rms_norm import row_layout, token_rows
from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
    widen,
)


def layer_norm_ref(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, out: Tensor
) -> Tensor:
    """x: [..., hidden] of any floating dtype; weight, bias: [hidden] of the same dtype, or None; or, for x of
    [..., num_heads, hidden], [num_heads, hidden].

    Returns out, of x's shape and dtype, which may be x itself.
    """
    if weight is None or weight.ndim == 1:
        return out.copy_(F.layer_norm(x, x.shape[-1:], weight, bias, eps))
    normed = F.layer_norm(x.float(), x.shape[-1:], None, None, eps).mul_(weight)
    return out.copy_(normed if bias is None else normed.add_(bias))


def add_layer_norm_ref(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    scale: float = 1.0,
    rows: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """Without rows: residual += scale * x, in place, and out = norm(residual). Returns out.

    With rows: out = norm((scale * x + residual)[rows]), and residual is left as it is: the last norm of a
    model, of which only the sampled tokens are needed.

    x, residual: [num_tokens, hidden] of one dtype; weight, bias: [hidden] of that dtype, or None; rows:
    [num_rows] int64, tokens, any number of times each; out: [num_tokens or num_rows, hidden] of the same
    dtype, and may be x without rows.
    """
    if rows is None:
        summed = residual.add_(scaled_ref(x, scale))
    else:
        summed = residual.index_select(0, rows).add_(scaled_ref(x.index_select(0, rows), scale))
    return layer_norm_ref(summed, weight, bias, eps=eps, out=out)


@triton.jit
def _load_or_fill(vector, columns, in_row, IS_GIVEN: tl.constexpr, DEFAULT: tl.constexpr):
    """A row's factors or terms, [TILE] float32."""
    if IS_GIVEN:
        return widen(tl.load(vector + columns, mask=in_row, other=0.0))
    return tl.full(columns.shape, DEFAULT, dtype=tl.float32)


@triton.jit
def _standardize(values, in_row, eps, HIDDEN: tl.constexpr):
    """One row, [TILE] float32 with zeros outside the row, to mean 0 and variance 1."""
    centered = tl.where(in_row, values - tl.sum(values, axis=0) * (1.0 / HIDDEN), 0.0)
    return centered * tl.rsqrt(tl.sum(centered * centered, axis=0) * (1.0 / HIDDEN) + eps)


@triton.jit
def _layer_norm_kernel(
    x,  # [num_tokens, num_heads, HIDDEN]
    weight,  # where HAS_WEIGHT: [HIDDEN], or [num_heads, HIDDEN] where HAS_WEIGHT_PER_HEAD
    bias,  # where HAS_BIAS: as weight
    out,  # [num_tokens, num_heads, HIDDEN]
    eps,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT_PER_HEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    columns = tl.arange(0, TILE)
    in_row = columns < HIDDEN
    token = tl.program_id(0).to(tl.int64)
    of_head = tl.program_id(1) * HIDDEN + columns
    of_weight = of_head if HAS_WEIGHT_PER_HEAD else columns
    factors = _load_or_fill(weight, of_weight, in_row, HAS_WEIGHT, 1.0)
    terms = _load_or_fill(bias, of_weight, in_row, HAS_BIAS, 0.0)
    wait_for_predecessor(PDL)
    values = widen(tl.load(x + token * X_STRIDE + of_head, mask=in_row, other=0.0))
    release_successor(PDL)
    normed = _standardize(values, in_row, eps, HIDDEN) * factors + terms
    tl.store(out + token * OUT_STRIDE + of_head, normed.to(out.dtype.element_ty), mask=in_row)


@triton.jit
def _add_layer_norm_kernel(
    x,  # [num_tokens, HIDDEN]
    residual,  # [num_tokens, HIDDEN], written unless HAS_ROWS
    weight,  # [HIDDEN] where HAS_WEIGHT
    bias,  # [HIDDEN] where HAS_BIAS
    rows,  # [num_programs] int64 where HAS_ROWS
    out,  # [num_programs, HIDDEN]
    eps,
    SCALE: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    columns = tl.arange(0, TILE)
    in_row = columns < HIDDEN
    factors = _load_or_fill(weight, columns, in_row, HAS_WEIGHT, 1.0)
    terms = _load_or_fill(bias, columns, in_row, HAS_BIAS, 0.0)
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
    normed = _standardize(widen(rounded), in_row, eps, HIDDEN) * factors + terms
    tl.store(out + line * HIDDEN + columns, normed.to(dtype), mask=in_row)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, out: Tensor) -> Tensor:
    """See `layer_norm_ref`. For the kernel x: [num_tokens, hidden] or [num_tokens, num_heads, hidden], tokens
    contiguous, at any stride."""
    if not runs_triton(x):
        return layer_norm_ref(x, weight, bias, eps=eps, out=out)
    assert out.shape == x.shape and out.dtype == x.dtype
    assert weight is None or bias is None or weight.shape == bias.shape
    rows = token_rows(x, out, weight)
    tile, num_warps = row_layout(rows.hidden)
    _layer_norm_kernel[(rows.num_tokens, rows.num_heads)](
        x,
        x if weight is None else weight,
        x if bias is None else bias,
        out,
        eps,
        X_STRIDE=x.stride(0),
        OUT_STRIDE=out.stride(0),
        HIDDEN=rows.hidden,
        TILE=tile,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_WEIGHT_PER_HEAD=weight is not None and weight.ndim == 2,
        num_warps=num_warps,
        **launch_options(x.device),
    )
    return out


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    scale: float = 1.0,
    rows: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """See `add_layer_norm_ref`. The kernel needs all tensors contiguous."""
    if not runs_triton(x):
        return add_layer_norm_ref(x, residual, weight, bias, eps=eps, scale=scale, rows=rows, out=out)
    num_programs, hidden = out.shape
    assert x.shape == residual.shape and x.shape[-1] == hidden
    assert num_programs == (x.shape[0] if rows is None else rows.shape[0])
    assert x.dtype == residual.dtype == out.dtype
    assert x.is_contiguous() and residual.is_contiguous() and out.is_contiguous()
    tile, num_warps = row_layout(hidden)
    _add_layer_norm_kernel[(num_programs,)](
        x,
        residual,
        x if weight is None else weight,
        x if bias is None else bias,
        x if rows is None else rows,
        out,
        eps,
        SCALE=scale,
        HIDDEN=hidden,
        TILE=tile,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_ROWS=rows is not None,
        num_warps=num_warps,
        **launch_options(x.device),
    )
    return out
