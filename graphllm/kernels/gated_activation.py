"""The gated activation of a feed-forward layer (Shazeer, 2020, arXiv:2002.05202).

y = f(gate) * up,  with f one of
silu:       f(x) = x * sigmoid(x)
gelu:       f(x) = x * Phi(x), Phi the normal distribution function
gelu_tanh:  f(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh"]


def gated_activation_ref(gate_up: Tensor, activation: Activation) -> Tensor:
    """gate_up: [num_tokens, 2 * intermediate], gates first. Returns [num_tokens, intermediate]."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "silu":
        return F.silu(gate).mul_(up)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none").mul_(up)


def gated_activation(gate_up: Tensor, activation: Activation) -> Tensor:
    """See `gated_activation_ref`."""
    return gated_activation_ref(gate_up, activation)
