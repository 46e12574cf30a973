"""Our FP8: plain weights rounded to e4m3 as they are loaded, with a scale a row; activations a scale a token.

    S_n = max_k |w_{n,k}| / 448,   Q_{n,k} = round(w_{n,k} / S_n)

Owns nothing but that; the arithmetic is `quant/scaled.py`'s, published checkpoints are
`quant/scaled_form.py`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphllm.kernels.linear import LinearProduct
from graphllm.quant.scaled import ScaledScheme
from graphllm.quant.scheme import CheckpointTensor, plain_tensors


class Fp8(ScaledScheme):
    """An ExpertScheme: quantized while a checkpoint of plain weights is loaded."""

    def __init__(self, plain: LinearProduct) -> None:
        super().__init__(plain, stored=torch.float8_e4m3fn, group_size=None, has_given_scale=False)

    def checkpoint_tensors(
        self, in_features: int, out_features: int, *, bias: bool
    ) -> dict[str, CheckpointTensor]:
        return plain_tensors(in_features, out_features, bias=bias)

    def load(self, layer: nn.Module, name: str, *, tensor: Tensor, first_row: int) -> None:
        if name == "bias":
            self.store_bias(layer, tensor, first_row=first_row)
        else:
            self.store_rounded(layer, tensor, first_row=first_row)
