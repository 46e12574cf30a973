"""Linear layers and stacks of experts whose weights stay packed in 4 or 8 bits (`kernels/packed_weight.py`).

Owns a layer's packed parameters, how rows get into them, and which product multiplies. A scheme derives from
`PackedScheme` and says only how the checkpoint's tensors become codes, scales and zeros.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import cast

import torch
from torch import Tensor, nn

from graphllm.kernels.expert_activation import ExpertActivation
from graphllm.kernels.gated_activation import Activation
from graphllm.kernels.linear import LinearProduct
from graphllm.kernels.moe_sum import SharedPart, moe_sum
from graphllm.kernels.moe_tiles import RoutedTokens
from graphllm.kernels.packed_cpu import cpu_packed_product
from graphllm.kernels.packed_grouped import (
    packed_grouped_gated,
    packed_grouped_gated_ref,
    packed_grouped_linear,
)
from graphllm.kernels.packed_grouped_sum import packed_grouped_sum, packed_grouped_sum_ref
from graphllm.kernels.packed_linear import MAX_TILED_ROWS, packed_gated_linear
from graphllm.kernels.packed_product import CardPackedProduct
from graphllm.kernels.packed_weight import PackedFormat, PackedWeight, dequantize, pack_codes
from graphllm.kernels.triton_support import runs_triton


class PackedScheme(ABC):
    """An ExpertScheme of packed weights; `plain` multiplies what has to be made plain first."""

    def __init__(self, plain: LinearProduct) -> None:
        self.on_cpu = cpu_packed_product(plain)
        self.on_card = CardPackedProduct(plain)

    @abstractmethod
    def format_of(self, in_features: int, out_features: int) -> PackedFormat:
        """How a layer of these sizes is stored."""

    @abstractmethod
    def checkpoint_shapes(
        self, in_features: int, out_features: int, *, bias: bool
    ) -> dict[str, tuple[int, ...]]:
        """See `LinearScheme`."""

    @abstractmethod
    def load(self, layer: nn.Module, name: str, *, tensor: Tensor, first_row: int) -> None:
        """See `LinearScheme`; stores by `store`, `store_order` and `store_bias`."""

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
        form = self.format_of(in_features, out_features)
        for name, (shape, own_dtype) in form.shapes(out_features, in_features).items():
            values = torch.empty(shape, device=device, dtype=own_dtype)
            if name == "codebook":
                assert form.codebook is not None
                values.copy_(torch.tensor(form.codebook))
            layer.register_parameter(name, nn.Parameter(values, requires_grad=False))
        for name in {"zeros", "order", "codebook"} - form.shapes(out_features, in_features).keys():
            layer.register_parameter(name, None)
        self.on_card.reserve(out_features, in_features, form=form, device=device)
        values = torch.empty(out_features, device=device, dtype=dtype)
        layer.register_parameter("bias", nn.Parameter(values, requires_grad=False) if bias else None)

    def store(
        self,
        layer: nn.Module,
        *,
        first_row: int,
        codes: Tensor | None = None,
        scales: Tensor | None = None,
        zeros: Tensor | None = None,
    ) -> None:
        """Store rows from `first_row` on; each of the three may come alone.

        codes: integers [rows, in_features], see `pack_codes`; scales and zeros: [rows, num_groups], cast to
        the format's dtypes (e8m0 scales are given as their bytes).
        """
        if codes is not None:
            codes = pack_codes(codes, self._format(layer).bits)
        for name, rows in (("codes", codes), ("scales", scales), ("zeros", zeros)):
            if rows is not None:
                layer.get_parameter(name)[first_row : first_row + len(rows)].copy_(rows)

    def store_order(self, layer: nn.Module, order: Tensor, *, index: int = 0) -> None:
        """Store an input order: [in_features], the input feature of each stored column."""
        layer.get_parameter("order")[index].copy_(order)

    def store_bias(self, layer: nn.Module, bias: Tensor, *, first_row: int) -> None:
        """Store rows of the bias."""
        layer.get_parameter("bias")[first_row : first_row + len(bias)].copy_(bias)

    def packed(self, layer: nn.Module) -> PackedWeight:
        """The layer's weight, over its parameters' memory."""
        return PackedWeight(
            self._format(layer),
            cast(int, layer.in_features),
            cast(Tensor, layer.codes),
            cast(Tensor, layer.scales),
            cast("Tensor | None", layer.zeros),
            cast("Tensor | None", layer.order),
            cast("Tensor | None", layer.codebook),
        )

    def dequantized_rows(
        self, layer: nn.Module, first_row: int, num_rows: int, *, dtype: torch.dtype
    ) -> Tensor:
        """Rows of the plain weight: [num_rows, in_features]."""
        return dequantize(self.packed(layer).rows(first_row, num_rows), dtype=dtype)

    def _format(self, layer: nn.Module) -> PackedFormat:
        return self.format_of(cast(int, layer.in_features), len(cast(Tensor, layer.codes)))

    def finish(self, layer: nn.Module) -> None:  # noqa: B027 - most schemes have nothing to do
        """Nothing is left to do after the last tensor."""

    def apply(self, layer: nn.Module, x: Tensor, *, out: Tensor) -> None:
        product = self.on_card if runs_triton(x) else self.on_cpu
        product(x, self.packed(layer), cast("Tensor | None", layer.bias), out)

    def apply_gated(self, layer: nn.Module, x: Tensor, activation: Activation, *, out: Tensor) -> bool:
        if not runs_triton(x) or len(x) > MAX_TILED_ROWS:
            return False
        bias = cast("Tensor | None", layer.bias)
        packed_gated_linear(x, self.packed(layer), bias, activation, out=out)
        return True

    def apply_experts_gated(
        self,
        layer: nn.Module,
        x: Tensor,
        routed: RoutedTokens,
        activation: ExpertActivation,
        *,
        out: Tensor,
    ) -> None:
        weight, (num_experts, bias) = self.packed(layer), _experts(layer)
        experts, tiles = routed.experts, routed.tiles
        if runs_triton(x):
            packed_grouped_gated(
                x, weight, bias, experts, activation, num_experts=num_experts, tiles=tiles, out=out
            )
        else:
            packed_grouped_gated_ref(
                x, weight, bias, experts, activation, num_experts=num_experts, out=out, product=self.on_cpu
            )

    def apply_experts(
        self,
        layer: nn.Module,
        x: Tensor,
        routed: RoutedTokens,
        shared: SharedPart | None,
        *,
        results: Tensor | None,
        out: Tensor,
    ) -> None:
        weight, (num_experts, bias) = self.packed(layer), _experts(layer)
        experts, weights, tiles = routed.experts, routed.weights, routed.tiles
        if not runs_triton(x):
            packed_grouped_sum_ref(
                x,
                weight,
                bias,
                experts,
                weights,
                shared,
                num_experts=num_experts,
                out=out,
                product=self.on_cpu,
            )
        elif tiles is None:
            packed_grouped_sum(x, weight, bias, experts, weights, shared, num_experts=num_experts, out=out)
        else:
            assert results is not None, "tiles store their results before they are added"
            packed_grouped_linear(
                x, weight, bias, experts, weights, num_experts=num_experts, tiles=tiles, out=results
            )
            moe_sum(results, experts, shared, out=out)


def _experts(layer: nn.Module) -> tuple[int, Tensor | None]:
    """A stack's number of experts, and its bias [num_experts, rows] or None."""
    num_experts, bias = cast(int, layer.num_experts), cast("Tensor | None", layer.bias)
    return num_experts, None if bias is None else bias.view(num_experts, -1)
