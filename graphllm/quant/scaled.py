"""Linear layers and stacks of experts whose weights and activations are multiplied in 8 bits, e4m3 or int8.

Activations are rounded in front of each product, with a scale for each token, for each token and group of
inputs, or one that the checkpoint gives. A card multiplies what is stored (`kernels/scaled_linear.py`). A CPU
has no units for it: it keeps the weights' numbers in float32, rounds activations as a card does, and
multiplies plainly, so results agree, and memory is not saved.

Owns a layer's parameters, the memory that rounded activations take, and which product multiplies. A scheme
derives from `ScaledScheme` and says how the checkpoint's tensors become values and scales.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from graphllm.arena import Arena
from graphllm.kernels.expert_activation import ExpertActivation
from graphllm.kernels.gated_activation import Activation
from graphllm.kernels.grouped_gemv import grouped_linear_sum_ref
from graphllm.kernels.grouped_linear import grouped_gated_linear_ref
from graphllm.kernels.linear import LinearProduct, LinearWorkspace
from graphllm.kernels.moe_sum import SharedPart, moe_sum
from graphllm.kernels.moe_tiles import RoutedTokens
from graphllm.kernels.quantize_rows import (
    dequantize_rows_ref,
    num_groups_of,
    quantize_rows,
    quantize_rows_ref,
)
from graphllm.kernels.scaled_grouped import scaled_grouped_gated, scaled_grouped_linear
from graphllm.kernels.scaled_grouped_gemv import scaled_grouped_gated_gemv, scaled_grouped_sum
from graphllm.kernels.scaled_library import library_works, scaled_linear_library, takes_library
from graphllm.kernels.scaled_linear import (
    ScaledRows,
    ScaledWeight,
    scaled_linear,
    scaled_workspace_size,
)
from graphllm.kernels.triton_support import INTERPRETED
from graphllm.quant.scheme import CheckpointTensor

# Rows are rounded some at a time: what is alive then stays in the processor's cache.
_SLICE_ELEMENTS = 1 << 18
# Of dummy weights' given scales: activations of about one, four of which the format's range holds.
_RANDOM_RANGE = 4.0


class ScaledScheme(ABC):
    """An ExpertScheme of weights in 8 bits, of `stored` with a scale for `group_size` inputs (None: a row).

    has_given_scale: the activations' scale comes from the checkpoint, one for a layer, the largest of its
    parts'. plain: the CPU's product.
    """

    def __init__(
        self,
        plain: LinearProduct,
        *,
        stored: torch.dtype,
        group_size: int | None,
        has_given_scale: bool,
    ) -> None:
        self.plain = plain
        self.stored = stored
        self.group_size = group_size
        self.has_given_scale = has_given_scale
        self._arena: Arena | None = None
        self._num_partials = self._num_counters = 0
        self._has_library = False

    @abstractmethod
    def checkpoint_tensors(
        self, in_features: int, out_features: int, *, bias: bool
    ) -> dict[str, CheckpointTensor]:
        """See `LinearScheme`."""

    @abstractmethod
    def load(self, layer: nn.Module, name: str, *, tensor: Tensor, first_row: int) -> None:
        """See `LinearScheme`; stores by `store`, `store_given_scale` and `store_bias`."""

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
        num_groups = num_groups_of(in_features, self.group_size)
        is_spelled_out = device.type == "cpu" and not INTERPRETED
        tensors: dict[str, Tensor | None] = {
            "plain": torch.empty(out_features, in_features, device=device) if is_spelled_out else None,
            "values": None,
            "scales": None,
            "given_scale": torch.zeros(1, device=device) if self.has_given_scale else None,
            "bias": torch.empty(out_features, device=device, dtype=dtype) if bias else None,
        }
        if not is_spelled_out:
            tensors["values"] = torch.empty(out_features, in_features, device=device, dtype=self.stored)
            tensors["scales"] = torch.empty(num_groups, out_features, device=device)
        for name, tensor in tensors.items():
            parameter = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            layer.register_parameter(name, parameter)
        partials, counters = scaled_workspace_size(out_features, in_features, group_size=self.group_size)
        self._num_partials = max(self._num_partials, partials)
        self._num_counters = max(self._num_counters, counters)
        self._has_library = self.stored == torch.float8_e4m3fn and library_works(device)

    def store(self, layer: nn.Module, values: Tensor, scales: Tensor, *, first_row: int) -> None:
        """Store rows from `first_row` on.

        values: [rows, in_features] of `stored`; scales: [rows, num_groups].
        """
        end = first_row + len(values)
        if (plain := cast("Tensor | None", layer.plain)) is not None:
            for rows in _slices(values):
                numbers = dequantize_rows_ref(values[rows], scales[rows].float(), self.group_size)
                plain[first_row : first_row + len(values)][rows].copy_(numbers)
            return
        cast(Tensor, layer.values)[first_row:end].copy_(values)
        cast(Tensor, layer.scales)[:, first_row:end].copy_(scales.t())

    def store_rounded(self, layer: nn.Module, numbers: Tensor, *, first_row: int) -> None:
        """Round plain rows [rows, in_features] as activations are, and store them from `first_row` on."""
        for rows in _slices(numbers):
            rounded = self._rounded(numbers[rows], None)
            self.store(layer, rounded.values, rounded.scales, first_row=first_row + rows.start)

    def store_given_scale(self, layer: nn.Module, scale: Tensor) -> None:
        """Take a part's scale of activations, [1]: the layer's is the largest."""
        given = cast(Tensor, layer.given_scale)
        given.copy_(torch.maximum(given, scale.float().to(given.device)))

    def store_bias(self, layer: nn.Module, bias: Tensor, *, first_row: int) -> None:
        """Store rows of the bias."""
        layer.get_parameter("bias")[first_row : first_row + len(bias)].copy_(bias)

    def finish(self, layer: nn.Module) -> None:  # noqa: B027 - part of the contract
        """Nothing is left to do after the last tensor."""

    def fill_random(self, layer: nn.Module, *, generator: torch.Generator, deviation: float) -> None:
        plain, values = (cast("Tensor | None", getattr(layer, name)) for name in ("plain", "values"))
        weight = values if plain is None else plain
        assert weight is not None
        for rows in _slices(weight):
            size = (rows.stop - rows.start, weight.shape[1])
            numbers = torch.empty(size, device=weight.device).normal_(0.0, deviation, generator=generator)
            self.store_rounded(layer, numbers, first_row=rows.start)
        if self.has_given_scale:
            cast(Tensor, layer.given_scale).fill_(_RANDOM_RANGE / 127)
        if (bias := cast("Tensor | None", layer.bias)) is not None:
            bias.normal_(0.0, deviation, generator=generator)

    def dequantized_rows(
        self, layer: nn.Module, first_row: int, num_rows: int, *, dtype: torch.dtype
    ) -> Tensor:
        rows = slice(first_row, first_row + num_rows)
        if (plain := cast("Tensor | None", layer.plain)) is not None:
            return plain[rows].to(dtype)
        values, scales = cast(Tensor, layer.values), cast(Tensor, layer.scales)
        return dequantize_rows_ref(values[rows], scales[:, rows].t(), self.group_size).to(dtype)

    def apply(self, layer: nn.Module, x: Tensor, *, out: Tensor) -> None:
        bias = cast("Tensor | None", layer.bias)
        if (plain := cast("Tensor | None", layer.plain)) is not None:
            sums = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
            self.plain(self._rounded_numbers(layer, x), plain, None if bias is None else bias.float(), sums)
            if sums is not out:
                out.copy_(sums)
            return
        rows, weight = self._rounded_in_arena(layer, x), self._weight(layer)
        if self._has_library and takes_library(rows, weight, bias, out):
            scaled_linear_library(rows, weight, out)
        else:
            scaled_linear(rows, weight, bias, out, workspace=self._workspace(x.device))

    def apply_gated(self, layer: nn.Module, x: Tensor, activation: Activation, *, out: Tensor) -> bool:
        """Two kernels: what is between them is little beside what the weights are."""
        return False

    def apply_experts_gated(
        self,
        layer: nn.Module,
        x: Tensor,
        routed: RoutedTokens,
        activation: ExpertActivation,
        *,
        out: Tensor,
    ) -> None:
        num_experts, bias = cast(int, layer.num_experts), cast("Tensor | None", layer.bias)
        experts, tiles = routed.experts, routed.tiles
        if (plain := cast("Tensor | None", layer.plain)) is not None:
            results = out.float()
            grouped_gated_linear_ref(
                self._rounded_numbers(layer, x),
                plain.view(num_experts, -1, plain.shape[1]),
                None if bias is None else bias.float().view(num_experts, -1),
                experts,
                activation,
                out=results,
                product=self.plain,
            )
            if results is not out:
                out.copy_(results)
            return
        rows, weight = self._rounded_in_arena(layer, x), self._weight(layer)
        if tiles is None:
            scaled_grouped_gated_gemv(
                rows, weight, bias, experts, activation, num_experts=num_experts, out=out
            )
        else:
            scaled_grouped_gated(
                rows, weight, bias, experts, activation, num_experts=num_experts, tiles=tiles, out=out
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
        num_experts, bias = cast(int, layer.num_experts), cast("Tensor | None", layer.bias)
        experts, weights, tiles = routed.experts, routed.weights, routed.tiles
        if (plain := cast("Tensor | None", layer.plain)) is not None:
            grouped_linear_sum_ref(
                self._rounded_numbers(layer, x),
                plain.view(num_experts, -1, plain.shape[1]),
                None if bias is None else bias.float().view(num_experts, -1),
                experts,
                weights,
                shared,
                out=out,
                product=self.plain,
            )
            return
        rows, weight = self._rounded_in_arena(layer, x), self._weight(layer)
        if tiles is None:
            scaled_grouped_sum(rows, weight, bias, experts, weights, shared, num_experts=num_experts, out=out)
        else:
            assert results is not None, "tiles store their results before they are added"
            scaled_grouped_linear(
                rows, weight, bias, experts, weights, num_experts=num_experts, tiles=tiles, out=results
            )
            moe_sum(results, experts, shared, out=out)

    def _weight(self, layer: nn.Module) -> ScaledWeight:
        return ScaledWeight(cast(Tensor, layer.values), cast(Tensor, layer.scales), self.group_size)

    def _rounded(self, x: Tensor, given: Tensor | None) -> ScaledRows:
        """By the reference, in memory of its own."""
        num_groups = num_groups_of(x.shape[1], self.group_size)
        values = torch.empty(x.shape, dtype=self.stored, device=x.device)
        scales = torch.empty(len(x), num_groups, device=x.device)
        quantize_rows_ref(x, self.group_size, given=given, out=values, scales=scales)
        return ScaledRows(values, scales)

    def _rounded_numbers(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What the rounded activations stand for, float32."""
        rounded = self._rounded(x, cast("Tensor | None", layer.given_scale))
        return dequantize_rows_ref(rounded.values, rounded.scales, self.group_size)

    def _rounded_in_arena(self, layer: nn.Module, x: Tensor) -> ScaledRows:
        """By the kernel. Products run one after the other, so that all of them share this memory; it grows
        with the largest step, which is the first."""
        arena = self._own_arena(x.device)
        rows = ScaledRows(
            arena.take("values", *x.shape, dtype=self.stored),
            arena.take("scales", len(x), num_groups_of(x.shape[1], self.group_size), dtype=torch.float32),
        )
        given = cast("Tensor | None", layer.given_scale)
        quantize_rows(x, self.group_size, given=given, out=rows.values, scales=rows.scales)
        return rows

    def _workspace(self, device: torch.device) -> LinearWorkspace:
        arena = self._own_arena(device)
        return LinearWorkspace(
            arena.take("partials", self._num_partials, dtype=torch.float32),
            arena.take("counters", self._num_counters, dtype=torch.int32),  # born zero
        )

    def _own_arena(self, device: torch.device) -> Arena:
        if self._arena is None:
            self._arena = Arena(device)
        return self._arena


def _slices(rows: Tensor) -> Iterator[slice]:
    """Slices of a matrix' rows that are small together."""
    size = max(1, _SLICE_ELEMENTS // max(1, rows.shape[1]))
    for first in range(0, len(rows), size):
        yield slice(first, min(first + size, len(rows)))
