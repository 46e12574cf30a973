"""Our 4-bit weights: any model's linear layers, rounded as they are loaded, in groups of 32 of a row.

    w_{n,k} ~ scale_{n,g} * code_{n,k} + offset_{n,g},   code in 0..15,  g = k // 32

Scales and offsets are float16, so a weight has 5 bits in all. A group begins with its smallest and largest
value at the ends of the grid, which is exact for weights that lie on such a grid already. Then a line is
fitted through values and codes by weighted least squares, values are rounded to it again, and so on; a group
takes the round with the smallest weighted sum of squared errors, each measured as it would be stored.

What weighs an input feature's errors is its activations' mean square, where somebody measured it
(`models/calibration.py`): a model has features that are hundreds of times as large as others. On Gemma 3 270M
that is worth four fifths of what perplexity loses.

Owns how a plain row becomes codes, scales and offsets.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from graphllm.kernels.packed_weight import PackedFormat
from graphllm.quant.packed import PackedScheme
from graphllm.quant.scheme import CheckpointTensor, plain_tensors

GROUP_SIZE = 32
_FORMAT = PackedFormat(bits=4, group_size=GROUP_SIZE, zeros="offset", scale_dtype=torch.float16)
_LARGEST_CODE = 15
_FITTING_ROUNDS = 4
# Of the mean: what every feature weighs at least, whatever the text was that it was measured on.
_LEAST_IMPORTANCE = 0.01
# Rows are quantized some at a time: what is alive then stays in the processor's cache.
_SLICE_ELEMENTS = 1 << 16
_LARGEST_HALF = 65504.0


class Int4(PackedScheme):
    """Weight-only, asymmetric, groups of 32: quantized while a checkpoint of plain weights is loaded.

    A layer may have `importance` [in_features] while it is loaded, see `quantize_int4`.
    """

    def format_of(self, in_features: int, out_features: int) -> PackedFormat:
        return _FORMAT

    def checkpoint_tensors(
        self, in_features: int, out_features: int, *, bias: bool
    ) -> dict[str, CheckpointTensor]:
        return plain_tensors(in_features, out_features, bias=bias)

    def load(self, layer: nn.Module, name: str, *, tensor: Tensor, first_row: int) -> None:
        if name == "bias":
            self.store_bias(layer, tensor, first_row=first_row)
            return
        importance = cast("Tensor | None", getattr(layer, "importance", None))
        rows_at_once = max(1, _SLICE_ELEMENTS // tensor.shape[1])
        for first in range(0, len(tensor), rows_at_once):
            codes, scales, offsets = quantize_int4(tensor[first : first + rows_at_once], importance)
            self.store(layer, first_row=first_row + first, codes=codes, scales=scales, zeros=offsets)

    def finish(self, layer: nn.Module) -> None:
        """See `PackedScheme`; what the rows were weighed by is not needed any more."""
        if hasattr(layer, "importance"):
            del layer.importance
        super().finish(layer)


def quantize_int4(rows: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """rows: [num_rows, in_features], floating; importance: [in_features] float32, not negative, how much a
    squared error matters, None for all alike. Returns (codes of the rows' shape, uint8; scales and offsets
    [num_rows, num_groups] float16).

    A group whose values are all the same has the scale 0 and that value as its offset.
    """
    num_rows, in_features = rows.shape
    values, padding = rows.float(), -in_features % GROUP_SIZE
    weights = torch.ones(in_features) if importance is None else importance / importance.mean()
    weights = weights + _LEAST_IMPORTANCE
    if padding:
        # More of the row's last value, which weighs nothing: it changes no range and no sum.
        values = torch.cat((values, values[:, -1:].expand(-1, padding)), 1)
        weights = torch.nn.functional.pad(weights, (0, padding))
    groups = values.reshape(-1, GROUP_SIZE)
    weights = weights.expand(num_rows, -1).reshape(-1, GROUP_SIZE)
    weights = weights / _sums(weights)
    weighted = weights * groups
    means = _sums(weighted)
    lowest, highest = groups.aminmax(dim=1, keepdim=True)
    best = _rounded(groups, weights, (highest - lowest) / _LARGEST_CODE, lowest)
    for _ in range(_FITTING_ROUNDS):
        fitted = _rounded(groups, weights, *_fitted(weights, best[1], weighted, means))
        is_better = fitted[0] < best[0]
        best = tuple(torch.where(is_better, new, old) for new, old in zip(fitted, best, strict=True))
    _, codes, scales, offsets = best
    return (
        codes.to(torch.uint8).view(num_rows, -1)[:, :in_features],
        scales.half().view(num_rows, -1),
        offsets.half().view(num_rows, -1),
    )


def _rounded(groups: Tensor, weights: Tensor, scales: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    """(weighted squared error [num_groups, 1], codes, scales, offsets) with the last two as stored."""
    scales, offsets = (
        numbers.clamp(-_LARGEST_HALF, _LARGEST_HALF).half().float() for numbers in (scales, offsets)
    )
    steps = torch.where(scales > 0, 1 / scales, 0.0)
    codes = (groups - offsets).mul_(steps).round_().clamp_(0, _LARGEST_CODE)
    errors = torch.addcmul(offsets, codes, scales).sub_(groups).square_().mul_(weights)
    return _sums(errors), codes, scales, offsets


def _fitted(weights: Tensor, codes: Tensor, weighted: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and offset of the line of least squares from codes to values.

    weights add up to 1 in each group; weighted are values times weights, and means their sums.
    """
    weighted_codes = weights * codes
    code_means = _sums(weighted_codes)
    variances = _sums(weighted_codes.mul_(codes)) - code_means.square()
    covariances = _sums(weighted * codes) - code_means * means
    scales = torch.where(variances > 0, covariances / variances.clamp(min=1e-30), 0.0).clamp_(min=0.0)
    return scales, means - scales * code_means


def _sums(groups: Tensor) -> Tensor:
    """[num_groups, 1]; a product with ones is several times as fast as a sum over so few."""
    return groups @ groups.new_ones(GROUP_SIZE, 1)
