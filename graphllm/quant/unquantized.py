"""Weights in the activations' own number format, row-major [out_features, in_features].

Owns the copy into place. Which library multiplies is the caller's choice, one for the whole process.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from graphllm.kernels.gated_activation import Activation
from graphllm.kernels.gated_linear import gated_config_for, gated_linear
from graphllm.kernels.linear import LinearProduct


class Unquantized:
    """A LinearScheme; `product` computes x W^T + b (see `kernels/linear.py`)."""

    def __init__(self, product: LinearProduct) -> None:
        self.product = product

    def create_weights(
        self,
        layer: nn.Module,
        *,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        for name, shape in self.checkpoint_shapes(in_features, out_features, bias=bias).items():
            values = torch.empty(shape, device=device, dtype=dtype)
            layer.register_parameter(name, nn.Parameter(values, requires_grad=False))
        if not bias:
            layer.register_parameter("bias", None)

    def checkpoint_shapes(
        self, in_features: int, out_features: int, *, bias: bool
    ) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"weight": (out_features, in_features)}
        if bias:
            shapes["bias"] = (out_features,)
        return shapes

    def load(self, layer: nn.Module, name: str, *, tensor: torch.Tensor, first_row: int) -> None:
        parameter = layer.get_parameter(name)
        parameter[first_row : first_row + tensor.shape[0]].copy_(tensor)

    def apply(self, layer: nn.Module, x: torch.Tensor, *, out: torch.Tensor) -> None:
        weight, bias = cast(torch.Tensor, layer.weight), cast("torch.Tensor | None", layer.bias)
        self.product(x, weight, bias, out)

    def apply_gated(
        self, layer: nn.Module, x: torch.Tensor, activation: Activation, *, out: torch.Tensor
    ) -> bool:
        if not x.is_cuda:
            return False
        weight, bias = cast(torch.Tensor, layer.weight), cast("torch.Tensor | None", layer.bias)
        config = gated_config_for(x, weight)
        if config is None:
            return False
        gated_linear(x, weight, bias, activation, out=out, config=config)
        return True
