"""The contract between a linear layer and the way its weights are stored.

A layer may be several layers of the checkpoint in one (query, key and value): its rows are then loaded
part by part. A layer knows nothing of its scheme but this.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from graphllm.kernels.expert_activation import ExpertActivation
from graphllm.kernels.gated_activation import Activation
from graphllm.kernels.moe_sum import SharedPart
from graphllm.kernels.moe_tiles import RoutedTokens


class LinearScheme(Protocol):
    """y = x W^T + b, W stored in some form."""

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
        """Register the layer's parameters, uninitialized and without gradients."""
        ...

    def checkpoint_shapes(
        self, in_features: int, out_features: int, *, bias: bool
    ) -> dict[str, tuple[int, ...]]:
        """The checkpoint tensors that `out_features` rows are made of: name ("weight") to shape."""
        ...

    def load(self, layer: nn.Module, name: str, *, tensor: torch.Tensor, first_row: int) -> None:
        """Store one checkpoint tensor, on the CPU, as the layer's rows from `first_row` onwards."""
        ...

    def apply(self, layer: nn.Module, x: torch.Tensor, *, out: torch.Tensor) -> None:
        """Multiply into `out`.

        x: [num_tokens, in_features]; out: [num_tokens, out_features], contiguous, of x's dtype or float32.
        """
        ...

    def apply_gated(
        self, layer: nn.Module, x: torch.Tensor, activation: Activation, *, out: torch.Tensor
    ) -> bool:
        """For a layer of gates and then as many factors: the product and its activation in one kernel.

        out: [num_tokens, out_features / 2]. False, with nothing done, where two kernels are the better way.
        """
        ...


class ExpertScheme(LinearScheme, Protocol):
    """A LinearScheme that also multiplies stacks: the rows of all experts of a layer, expert after expert.

    A stack is created and loaded like a linear layer of as many rows as all its experts have together, so a
    scheme stores experts in whatever form it stores rows. `layer.num_experts` says how many they are.
    """

    def apply_experts_gated(
        self,
        layer: nn.Module,
        x: torch.Tensor,
        routed: RoutedTokens,
        activation: ExpertActivation,
        *,
        out: torch.Tensor,
    ) -> None:
        """Each pair of a token and its expert through the expert's gates and factors.

        x: [num_tokens, in_features]. An expert's rows are its gates, then as many factors. out: [num_tokens *
        top_k, half of an expert's rows]; the rows of padding are left as they are.
        """
        ...

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
        """Each pair's row through its expert, and the weighted sum of a token's pairs and the shared part.

        x: [num_tokens * top_k, in_features]; out: [num_tokens, an expert's rows], which may be the shared
        output. results: memory for [num_tokens * top_k, an expert's rows] of x's dtype; needed with tiles.
        """
        ...
