"""Our 4-bit weights: any model's linear layers, rounded as they are loaded, in groups of 32 of a row.

    w_{n,k} ~ scale_{n,g} * code_{n,k} + offset_{n,g},   code in 0..15,  g = k // 32

Scales and offsets are float16, so a weight has 5 bits in all. A group begins with its smallest and largest
value at the ends of the grid, which is exact for weights that lie on such a grid already. Then narrower
grids are tried, which cut the extremes off and are finer for the rest, and the best one's scale and offset
are fitted to its codes by least squares; a group takes what has the smallest sum of squared errors, each
candidate measured as it would be stored.

Owns how a plain row becomes codes, scales and offsets.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphllm.kernels.packed_weight import PackedFormat
from graphllm.quant.packed import PackedScheme

GROUP_SIZE = 32
_FORMAT = PackedFormat(bits=4, group_size=GROUP_SIZE, zeros="offset", scale_dtype=torch.float16)
_LARGEST_CODE = 15
# How far the grid reaches, as parts of the group's own range.
_RANGES = (1.0, 0.95, 0.9, 0.85, 0.8)
# Rows are quantized some at a time: what is alive then stays in the processor's cache.
_SLICE_ELEMENTS = 1 << 16
_LARGEST_HALF = 65504.0


class Int4(PackedScheme):
    """Weight-only, asymmetric, groups of 32: quantized while a checkpoint of plain weights is loaded."""

    def format_of(self, in_features: int, out_features: int) -> PackedFormat:
        return _FORMAT

    def checkpoint_shapes(
        self, in_features: int, out_features: int, *, bias: bool
    ) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"weight": (out_features, in_features)}
        return shapes | ({"bias": (out_features,)} if bias else {})

    def load(self, layer: nn.Module, name: str, *, tensor: Tensor, first_row: int) -> None:
        if name == "bias":
            self.store_bias(layer, tensor, first_row=first_row)
            return
        rows_at_once = max(1, _SLICE_ELEMENTS // tensor.shape[1])
        for first in range(0, len(tensor), rows_at_once):
            codes, scales, offsets = quantize_int4(tensor[first : first + rows_at_once])
            self.store(layer, first_row=first_row + first, codes=codes, scales=scales, zeros=offsets)


def quantize_int4(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rows: [num_rows, in_features], floating -> (codes of the same shape, uint8; scales and offsets
    [num_rows, num_groups] float16).

    A group whose values are all the same has the scale 0 and that value as its offset.
    """
    num_rows, in_features = rows.shape
    values = rows.float()
    if padding := -in_features % GROUP_SIZE:
        # More of the row's last value: it changes neither the range nor what is stored of the others.
        values = torch.cat((values, values[:, -1:].expand(-1, padding)), 1)
    groups = values.reshape(-1, GROUP_SIZE)
    lowest, highest = groups.aminmax(dim=1, keepdim=True)
    best: tuple[Tensor, ...] | None = None
    for part in _RANGES:
        cut = (highest - lowest) * ((1 - part) / 2)
        candidate = _rounded(groups, (highest - lowest) * (part / _LARGEST_CODE), lowest + cut)
        best = candidate if best is None else _better(best, candidate)
    assert best is not None
    best = _better(best, _rounded(groups, *_fitted(groups, best[1])))
    _, codes, scales, offsets = best
    return (
        codes.to(torch.uint8).view(num_rows, -1)[:, :in_features],
        scales.half().view(num_rows, -1),
        offsets.half().view(num_rows, -1),
    )


def _rounded(groups: Tensor, scales: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    """(squared error [num_groups, 1], codes, scales, offsets) with scales and offsets as they are stored."""
    scales, offsets = (
        numbers.clamp(-_LARGEST_HALF, _LARGEST_HALF).half().float() for numbers in (scales, offsets)
    )
    steps = torch.where(scales > 0, 1 / scales, 0.0)
    codes = (groups - offsets).mul_(steps).round_().clamp_(0, _LARGEST_CODE)
    errors = torch.addcmul(offsets, codes, scales).sub_(groups).square_().sum(1, keepdim=True)
    return errors, codes, scales, offsets


def _better(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of each group the candidate with the smaller error; the first where they are equal."""
    is_second = second[0] < first[0]
    return tuple(torch.where(is_second, new, old) for old, new in zip(first, second, strict=True))


def _fitted(groups: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and offset that bring the codes closest to the group: the line of least squares."""
    code_mean, mean = codes.mean(1, keepdim=True), groups.mean(1, keepdim=True)
    centered = codes - code_mean
    variance = centered.square().sum(1, keepdim=True)
    covariance = centered.mul_(groups - mean).sum(1, keepdim=True)
    scales = torch.where(variance > 0, covariance / variance.clamp(min=1e-30), 0.0).clamp_(min=0.0)
    return scales, mean - scales * code_mean
