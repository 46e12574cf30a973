"""The product of 8-bit floats through torch, for many rows: `scaled_linear.py`'s with a scale a row.

Owns the call of `torch._scaled_mm`, and the question which products it takes: on a card on which it was seen
to work, e4m3 with a scale for each row of both operands, written in bfloat16, of sizes that are multiples of
16. What it does not take is `scaled_linear`'s.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from graphllm.kernels.scaled_linear import MAX_STREAMED_ROWS, ScaledRows, ScaledWeight

_MULTIPLE = 16


def takes_library(x: ScaledRows, weight: ScaledWeight, bias: Tensor | None, out: Tensor) -> bool:
    """Whether `scaled_linear_library` computes this product, where `library_works`."""
    return (
        len(x.values) > MAX_STREAMED_ROWS
        and bias is None
        and weight.group_size is None
        and weight.values.dtype == torch.float8_e4m3fn
        and out.dtype == torch.bfloat16
        and all(size % _MULTIPLE == 0 for size in weight.values.shape)
    )


@functools.cache
def library_works(device: torch.device) -> bool:
    """Whether a small product comes out right on a device. Older versions of torch refuse some cards.

    It waits for the device, so it is no part of a step.
    """
    if device.type != "cuda":
        return False
    size = 2 * _MULTIPLE
    ones = torch.ones(size, size, device=device).to(torch.float8_e4m3fn)
    row_scales, column_scales = torch.ones(size, 1, device=device), torch.ones(1, size, device=device)
    out = torch.empty(size, size, dtype=torch.bfloat16, device=device)
    try:
        scaled_linear_library(ScaledRows(ones, row_scales), ScaledWeight(ones, column_scales, None), out)
        return bool((out == size).all())
    except (RuntimeError, TypeError, ValueError):
        return False


def scaled_linear_library(x: ScaledRows, weight: ScaledWeight, out: Tensor) -> Tensor:
    """`scaled_linear_ref` without a bias, for what `takes_library` says."""
    return torch._scaled_mm(
        x.values,
        weight.values.t(),
        scale_a=x.scales,
        scale_b=weight.scales,
        out_dtype=out.dtype,
        use_fast_accum=False,
        out=out,
    )
