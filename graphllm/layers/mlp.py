"""The gated feed-forward layer: down(f(gate(x)) * up(x))."""

from __future__ import annotations

import torch
from torch import nn

from graphllm.kernels.gated_activation import Activation, gated_activation
from graphllm.layers.linear import Linear
from graphllm.quant.scheme import LinearScheme


class GatedMLP(nn.Module):
    """Gate and up projections are one product; the gate's rows come first."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Activation,
        bias: bool,
        scheme: LinearScheme,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        parts = {"gate": intermediate_size, "up": intermediate_size}
        self.gate_up = Linear(hidden_size, parts, bias=bias, scheme=scheme, device=device, dtype=dtype)
        self.down = Linear(
            intermediate_size, {"": hidden_size}, bias=bias, scheme=scheme, device=device, dtype=dtype
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_tokens, hidden_size]; returns the same shape, without the residual."""
        hidden: torch.Tensor = self.gate_up(x)  # [num_tokens, 2 * intermediate_size]
        output: torch.Tensor = self.down(gated_activation(hidden, self.activation))
        return output
