"""Linear layers and stacks of experts whose weights stay packed in 4 or 8 bits (`kernels/packed_weight.py`).

Owns a layer's packed parameters, how rows get into them, and which product multiplies. A scheme derives from
`PackedScheme` and says only how the checkpoint's tensors become codes, scales and zeros.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from graphllm.kernels.expert_activation import ExpertActivation
from graphllm.kernels.gated_activation import Activation
from graphllm.kernels.linear import LinearProduct
from graphllm.kernels.moe_sum import SharedPart, moe_sum
from graphllm.kernels.moe_tiles import RoutedTokens
from graphllm.kernels.packed_cpu import PackedProduct, cpu_packed_product, library_form
from graphllm.kernels.packed_grouped import (
    packed_grouped_gated,
    packed_grouped_gated_ref,
    packed_grouped_linear,
)
from graphllm.kernels.packed_grouped_sum import packed_grouped_sum, packed_grouped_sum_ref
from graphllm.kernels.packed_linear import MAX_TILED_ROWS, packed_gated_linear
from graphllm.kernels.packed_product import CardPackedProduct
from graphllm.kernels.packed_weight import (
    SYMMETRIC_ZERO,
    PackedFormat,
    PackedWeight,
    dequantize,
    pack_codes,
)
from graphllm.kernels.triton_support import runs_triton
from graphllm.quant.scheme import CheckpointTensor


class PackedScheme(ABC):
    """An ExpertScheme of packed weights; `plain` multiplies what has to be made plain first."""

    def __init__(self, plain: LinearProduct) -> None:
        self.on_cpu: PackedProduct = cpu_packed_product(plain)
        self.on_card = CardPackedProduct(plain)
        self._finished = WeakKeyDictionary[nn.Module, PackedWeight]()

    @abstractmethod
    def format_of(self, in_features: int, out_features: int) -> PackedFormat:
        """How a layer of these sizes is stored."""

    @abstractmethod
    def checkpoint_tensors(
        self, in_features: int, out_features: int, *, bias: bool
    ) -> dict[str, CheckpointTensor]:
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
        for name in ("library_codes", "library_scales"):
            layer.register_buffer(name, None, persistent=False)
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
        finished = self._finished.get(layer)
        return self._view(layer) if finished is None else finished

    def _view(self, layer: nn.Module) -> PackedWeight:
        return PackedWeight(
            self._format(layer),
            cast(int, layer.in_features),
            cast(Tensor, layer.codes),
            cast(Tensor, layer.scales),
            cast("Tensor | None", layer.zeros),
            cast("Tensor | None", layer.order),
            cast("Tensor | None", layer.codebook),
            cast("Tensor | None", layer.library_codes),
            cast("Tensor | None", layer.library_scales),
        )

    def dequantized_rows(
        self, layer: nn.Module, first_row: int, num_rows: int, *, dtype: torch.dtype
    ) -> Tensor:
        """Rows of the plain weight: [num_rows, in_features]."""
        return dequantize(self.packed(layer).rows(first_row, num_rows), dtype=dtype)

    def fill_random(self, layer: nn.Module, *, generator: torch.Generator, deviation: float) -> None:
        """Codes drawn evenly, and scales that give their values the deviation."""
        form = self._format(layer)
        codes, scales = cast(Tensor, layer.codes), cast(Tensor, layer.scales)
        lowest, end = (0, 256) if form.bits == 4 else (-128, 128)  # a byte of 4 bits holds two codes
        codes.random_(lowest, end, generator=generator)
        values = torch.tensor(form.codebook or range(2**form.bits), dtype=torch.float32)
        scale = deviation / float(values.std())
        if form.scale_dtype == torch.uint8:
            scales.fill_(127 + round(math.log2(scale)))
        else:
            scales.fill_(scale)
        if form.zeros != "none":
            middle = SYMMETRIC_ZERO[form.bits]
            cast(Tensor, layer.zeros).fill_(middle if form.zeros == "integer" else -middle * scale)
        if form.num_orders:
            order = cast(Tensor, layer.order)
            order.copy_(torch.arange(order.shape[1]).expand_as(order))
        if (bias := cast("Tensor | None", layer.bias)) is not None:
            bias.normal_(0.0, deviation, generator=generator)

    def _format(self, layer: nn.Module) -> PackedFormat:
        return self.format_of(cast(int, layer.in_features), len(cast(Tensor, layer.codes)))

    def finish(self, layer: nn.Module) -> None:
        """After the last tensor: prepare 4-bit codes for torch's product on a CPU, where it has one.

        From now on the layer's tensors stay where they are. A stack's codes are not prepared: torch's form
        cannot be cut into experts.
        """
        weight, is_stack = self._view(layer), hasattr(layer, "num_experts")
        if weight.codes.device.type == "cpu" and not runs_triton(weight.codes) and not is_stack:
            prepared = library_form(weight)
            if prepared is not None:
                layer.library_codes, layer.library_scales = prepared
        self._finished[layer] = self._view(layer)

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
