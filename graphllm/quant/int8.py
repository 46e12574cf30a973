"""Our 8-bit weights: any model's linear layers, rounded as they are loaded, with one scale a row.

    scale_n = max_k |w_{n,k}| / 127,   code_{n,k} = round(w_{n,k} / scale_n)

Owns how a plain row becomes codes and a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphllm.kernels.packed_weight import PackedFormat
from graphllm.quant.packed import PackedScheme
from graphllm.quant.scheme import CheckpointTensor, plain_tensors

_FORMAT = PackedFormat(bits=8, group_size=None, scale_dtype=torch.float32)
_LARGEST_CODE = 127
# Rows are quantized some at a time: what is alive then stays in the processor's cache.
_SLICE_ELEMENTS = 1 << 16


class Int8(PackedScheme):
    """Weight-only, symmetric, a scale a row: quantized while a checkpoint of plain weights is loaded."""

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
        rows_at_once = max(1, _SLICE_ELEMENTS // tensor.shape[1])
        for first in range(0, len(tensor), rows_at_once):
            codes, scales = quantize_int8(tensor[first : first + rows_at_once])
            self.store(layer, first_row=first_row + first, codes=codes, scales=scales)


def quantize_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows: [num_rows, in_features], floating -> (codes of its shape, int8; scales [num_rows, 1] float32).

    A row of zeros has the scale 0.
    """
    rows = rows.float()
    scales = rows.abs().amax(1, keepdim=True) / _LARGEST_CODE
    codes = (rows / scales).nan_to_num_(0.0).round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE)
    return codes.to(torch.int8), scales
