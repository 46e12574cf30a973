"""The contract between a linear layer and the way its weights are stored.

A layer may be several layers of the checkpoint in one (query, key and value): its rows are then loaded
part by part. A layer knows nothing of its scheme but this.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from graphllm.kernels.gated_activation import Activation


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
