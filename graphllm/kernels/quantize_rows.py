"""Rows of activations in 8 bits, e4m3 or int8, with a scale a row, a scale a group, or one given scale.

    m = max_j |x_j| over a row or a group,   s = m / L,   stored_j = round(x_j * (L / m))       (dynamic)
    s given,                                stored_j = round(clamp(x_j / s, l, L))              (static)

to nearest, ties to even, L the format's largest number (e4m3: 448, int8: 127) and l its least (-448, -128).
The arithmetic of the first
is `kv_quantization.py`'s: a row of zeros has scale 0 and stores zeros. What is beyond a given scale's range
saturates, as the cards' own conversion does.

Owns both, and their layout: scales are [num_rows, num_groups], a given one repeated for every row, so that
one product serves all of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.kv_quantization import LARGEST_STORED, kv_scale, quantize, quantize_kv_ref
from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
    widen,
)

# Columns that a program holds at once; a longer row is gone through twice.
_MAX_CHUNK = 8192
_NUM_WARPS = 8


def num_groups_of(in_features: int, group_size: int | None) -> int:
    """Scales of a row; group_size None is a whole row. The last group may be shorter."""
    return 1 if group_size is None else -(-in_features // group_size)


def quantize_rows_ref(
    x: Tensor, group_size: int | None, *, given: Tensor | None, out: Tensor, scales: Tensor
) -> Tensor:
    """x: [num_rows, in_features], any floating dtype; group_size: columns of a scale, None for the row.

    given: [1] float32, the scale of all rows, or None to take each from its values; it goes with whole rows.
    Writes out: [num_rows, in_features], e4m3 or int8, and scales: [num_rows, num_groups] float32. Returns
    out.
    """
    if given is not None:
        limit = LARGEST_STORED[out.dtype]
        # Divided and multiplied as the kernel does.
        scaled = (x.float() * (1.0 / given)).clamp(-128 if out.dtype == torch.int8 else -limit, limit)
        scales.copy_(given.expand_as(scales))
        return out.copy_((scaled.round() if out.dtype == torch.int8 else scaled).to(out.dtype))
    num_rows, in_features = x.shape
    num_groups = scales.shape[1]
    size = in_features if group_size is None else group_size
    padded = torch.nn.functional.pad(x.float(), (0, num_groups * size - in_features))
    stored, own = quantize_kv_ref(padded.view(num_rows, num_groups, size), out.dtype)
    scales.copy_(own)
    return out.copy_(stored.view(num_rows, -1)[:, :in_features])


def dequantize_rows_ref(stored: Tensor, scales: Tensor, group_size: int | None) -> Tensor:
    """What `quantize_rows_ref` has stored, in float32: [num_rows, in_features]."""
    numbers = stored.float() if stored.dtype == torch.int8 else _numbers_of_e4m3(stored)
    if group_size is None:
        return numbers * scales
    spread = scales.repeat_interleave(group_size, dim=1)[:, : stored.shape[1]]
    return numbers * spread


def _numbers_of_e4m3(stored: Tensor) -> Tensor:
    """In float32. On a CPU by a table, which is six times as fast as torch's conversion."""
    if stored.device.type != "cpu":
        return stored.float()
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return table.index_select(0, stored.view(torch.uint8).flatten().int()).view(stored.shape)


@triton.jit
def _quantize_rows_kernel(
    x,  # [num_rows, IN_FEATURES]
    given,  # [1] float32 where IS_GIVEN
    out,  # [num_rows, IN_FEATURES]
    scales,  # [num_rows] float32
    IN_FEATURES: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_GIVEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program for each row."""
    wait_for_predecessor(PDL)
    release_successor(PDL)
    stored: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, CHUNK)
    values_at = x + row * IN_FEATURES + columns
    places = out + row * IN_FEATURES + columns
    LIMIT: tl.constexpr = 448.0 if stored.is_fp8e4nv() else 127.0
    LEAST: tl.constexpr = -448.0 if stored.is_fp8e4nv() else -128.0
    if IS_GIVEN:
        scale = tl.load(given)
        factor = tl.div_rn(1.0, scale)
    else:
        largest = tl.zeros((CHUNK,), tl.float32)
        for first in tl.range(0, IN_FEATURES, CHUNK):
            values = widen(tl.load(values_at + first, mask=columns + first < IN_FEATURES, other=0.0))
            largest = tl.maximum(largest, tl.abs(values))
        scale, factor = kv_scale(tl.max(largest, 0), stored)
    tl.store(scales + row, scale)
    for first in tl.range(0, IN_FEATURES, CHUNK):
        mask = columns + first < IN_FEATURES
        scaled = widen(tl.load(values_at + first, mask=mask, other=0.0)) * factor
        if IS_GIVEN:
            scaled = tl.clamp(scaled, LEAST, LIMIT)
        tl.store(places + first, quantize(scaled, stored), mask=mask)


@triton.jit
def _quantize_groups_kernel(
    x,  # [num_rows, IN_FEATURES]
    out,  # [num_rows, IN_FEATURES]
    scales,  # [num_rows, NUM_GROUPS] float32
    IN_FEATURES: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program for some groups of a row."""
    wait_for_predecessor(PDL)
    release_successor(PDL)
    stored: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = groups[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
    mask = columns < IN_FEATURES
    values = widen(tl.load(x + row * IN_FEATURES + columns, mask=mask, other=0.0))
    scale, factor = kv_scale(tl.max(tl.abs(values), 1), stored)
    tl.store(scales + row * NUM_GROUPS + groups, scale, mask=groups < NUM_GROUPS)
    tl.store(out + row * IN_FEATURES + columns, quantize(values * factor[:, None], stored), mask=mask)


def quantize_rows(
    x: Tensor, group_size: int | None, *, given: Tensor | None, out: Tensor, scales: Tensor
) -> Tensor:
    """See `quantize_rows_ref`. The kernel needs all tensors contiguous, and groups that are powers of two."""
    if not runs_triton(x):
        return quantize_rows_ref(x, group_size, given=given, out=out, scales=scales)
    num_rows, in_features = x.shape
    num_groups = num_groups_of(in_features, group_size)
    assert out.shape == x.shape and scales.shape == (num_rows, num_groups)
    assert x.is_contiguous() and out.is_contiguous() and scales.is_contiguous()
    if num_rows == 0:
        return out
    if group_size is None:
        _quantize_rows_kernel[(num_rows,)](
            x,
            scales if given is None else given,
            out,
            scales,
            IN_FEATURES=in_features,
            CHUNK=min(triton.next_power_of_2(in_features), _MAX_CHUNK),
            IS_GIVEN=given is not None,
            num_warps=_NUM_WARPS,
            **launch_options(x.device),
        )
        return out
    assert given is None and group_size == triton.next_power_of_2(group_size)
    groups = max(1, min(triton.next_power_of_2(num_groups), _MAX_CHUNK // group_size))
    _quantize_groups_kernel[(num_rows, triton.cdiv(num_groups, groups))](
        x,
        out,
        scales,
        IN_FEATURES=in_features,
        NUM_GROUPS=num_groups,
        GROUP_SIZE=group_size,
        GROUPS=groups,
        num_warps=_NUM_WARPS,
        **launch_options(x.device),
    )
    return out
