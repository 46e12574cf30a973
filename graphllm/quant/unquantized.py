"""Weights in the activations' own number format, row-major [out_features, in_features].

Owns the copy into place. Which library multiplies is the caller's choice, one for the whole process.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from graphllm.kernels.expert_activation import ExpertActivation
from graphllm.kernels.gated_activation import Activation
from graphllm.kernels.gated_linear import gated_config_for, gated_linear
from graphllm.kernels.grouped_gemv import (
    grouped_gated_gemv,
    grouped_linear_sum_gemv,
    grouped_linear_sum_ref,
)
from graphllm.kernels.grouped_linear import (
    grouped_gated_linear,
    grouped_gated_linear_ref,
    grouped_linear,
)
from graphllm.kernels.linear import LinearProduct
from graphllm.kernels.moe_sum import SharedPart, moe_sum
from graphllm.kernels.moe_tiles import RoutedTokens
from graphllm.kernels.triton_support import runs_triton
from graphllm.quant.scheme import CheckpointTensor, plain_tensors


class Unquantized:
    """An ExpertScheme; `product` computes x W^T + b (see `kernels/linear.py`)."""

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
        shapes: dict[str, tuple[int, ...]] = {"weight": (out_features, in_features), "bias": (out_features,)}
        if not bias:
            del shapes["bias"]
        for name, shape in shapes.items():
            values = torch.empty(shape, device=device, dtype=dtype)
            layer.register_parameter(name, nn.Parameter(values, requires_grad=False))
        if not bias:
            layer.register_parameter("bias", None)

    def checkpoint_tensors(
        self, in_features: int, out_features: int, *, bias: bool
    ) -> dict[str, CheckpointTensor]:
        return plain_tensors(in_features, out_features, bias=bias)

    def load(self, layer: nn.Module, name: str, *, tensor: torch.Tensor, first_row: int) -> None:
        parameter = layer.get_parameter(name)
        parameter[first_row : first_row + tensor.shape[0]].copy_(tensor)

    def finish(self, layer: nn.Module) -> None:
        """Nothing is left to do."""

    def fill_random(self, layer: nn.Module, *, generator: torch.Generator, deviation: float) -> None:
        for parameter in layer.parameters(recurse=False):
            parameter.normal_(0.0, deviation, generator=generator)

    def dequantized_rows(
        self, layer: nn.Module, first_row: int, num_rows: int, *, dtype: torch.dtype
    ) -> torch.Tensor:
        return cast(torch.Tensor, layer.weight)[first_row : first_row + num_rows].to(dtype)

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

    def apply_experts_gated(
        self,
        layer: nn.Module,
        x: torch.Tensor,
        routed: RoutedTokens,
        activation: ExpertActivation,
        *,
        out: torch.Tensor,
    ) -> None:
        weight, bias = _stack(layer)
        experts, tiles = routed.experts, routed.tiles
        if not runs_triton(x):
            grouped_gated_linear_ref(x, weight, bias, experts, activation, out=out, product=self.product)
        elif tiles is None:
            grouped_gated_gemv(x, weight, bias, experts, activation, out=out)
        else:
            grouped_gated_linear(x, weight, bias, experts, activation, tiles=tiles, out=out)

    def apply_experts(
        self,
        layer: nn.Module,
        x: torch.Tensor,
        routed: RoutedTokens,
        shared: SharedPart | None,
        *,
        results: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        weight, bias = _stack(layer)
        experts, weights, tiles = routed.experts, routed.weights, routed.tiles
        if not runs_triton(x):
            product = self.product
            grouped_linear_sum_ref(x, weight, bias, experts, weights, shared, out=out, product=product)
        elif tiles is None:
            grouped_linear_sum_gemv(x, weight, bias, experts, weights, shared, out=out)
        else:
            assert results is not None, "tiles store their results before they are added"
            grouped_linear(x, weight, bias, experts, weights, tiles=tiles, out=results)
            moe_sum(results, experts, shared, out=out)


def _stack(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A stack's weight [num_experts, rows, in_features], and its bias [num_experts, rows] or None."""
    weight, bias = cast(torch.Tensor, layer.weight), cast("torch.Tensor | None", layer.bias)
    num_experts = cast(int, layer.num_experts)
    stacked = weight.view(num_experts, -1, weight.shape[1])
    return stacked, None if bias is None else bias.view(num_experts, -1)
