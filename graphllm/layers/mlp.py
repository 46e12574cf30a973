"""The feed-forward layers: down(f(gate(x)) * up(x)), and down(f(up(x)))."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from graphllm.arena import Arena
from graphllm.kernels.activation import activation as activate
from graphllm.kernels.gated_activation import Activation, gated_activation
from graphllm.layers.linear import Linear
from graphllm.quant.scheme_source import SchemeSource


class GatedMLP(nn.Module):
    """Gate and up projections are one product; the gate's rows come first."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Activation,
        bias: bool,
        schemes: SchemeSource,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.intermediate_size = intermediate_size
        parts = {"gate": intermediate_size, "up": intermediate_size}
        linear = partial(Linear, bias=bias, device=device, dtype=dtype)
        self.gate_up = linear(hidden_size, parts, scheme=schemes.at("gate_up"))
        self.down = linear(intermediate_size, {"": hidden_size}, scheme=schemes.at("down"))

    def forward(self, x: torch.Tensor, *, arena: Arena) -> torch.Tensor:
        """x: [num_tokens, hidden_size]; returns the same shape, without the residual."""
        activated = arena.take("inner", x.shape[0], self.intermediate_size, dtype=x.dtype)
        # An adapter is added before the activation, so its tokens need both products.
        is_fused = not self.gate_up.is_adapted and self.gate_up.scheme.apply_gated(
            self.gate_up, x, self.activation, out=activated
        )
        if not is_fused:
            gate_up: torch.Tensor = self.gate_up(
                x, arena=arena, name="wide"
            )  # [num_tokens, 2 * intermediate]
            gated_activation(gate_up, self.activation, out=activated)
        output: torch.Tensor = self.down(activated, arena=arena, name="delta")
        return output


class PlainMLP(nn.Module):
    """Without a gate: up, activation, down."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Activation,
        bias: bool,
        schemes: SchemeSource,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        linear = partial(Linear, bias=bias, device=device, dtype=dtype)
        self.up = linear(hidden_size, {"": intermediate_size}, scheme=schemes.at("up"))
        self.down = linear(intermediate_size, {"": hidden_size}, scheme=schemes.at("down"))

    def forward(self, x: torch.Tensor, *, arena: Arena) -> torch.Tensor:
        """x: [num_tokens, hidden_size]; returns the same shape, without the residual."""
        inner: torch.Tensor = self.up(x, arena=arena, name="inner")
        activate(inner, self.activation, out=inner)
        output: torch.Tensor = self.down(inner, arena=arena, name="delta")
        return output
