"""The activation of an expert's feed-forward layer: those of `gated_activation.py`, or the clamped SwiGLU.

    clamped:  y = (clamp(up, -limit, limit) + 1) * g * sigmoid(alpha * g),  g = min(gate, limit)

(gpt-oss, OpenAI, 2025, arXiv:2508.10925). It runs in float32 and is rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.gated_activation import Activation, activate, gated_activation_ref
from graphllm.kernels.triton_support import widen


@dataclass(frozen=True, slots=True)
class ClampedSwiGLU:
    """The clamped SwiGLU with its two numbers."""

    alpha: float
    limit: float


ExpertActivation = Activation | ClampedSwiGLU


def expert_activation_ref(gate_up: Tensor, activation: ExpertActivation, *, out: Tensor) -> Tensor:
    """gate_up: [num_rows, 2 * intermediate], gates first; out: [num_rows, intermediate], returned."""
    if not isinstance(activation, ClampedSwiGLU):
        return gated_activation_ref(gate_up, activation, out=out)
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate = gate.clamp(max=activation.limit)
    up = up.clamp(-activation.limit, activation.limit)
    return out.copy_((up + 1.0) * gate * torch.sigmoid(activation.alpha * gate))


def activation_constants(activation: ExpertActivation) -> dict[str, str | float]:
    """Keyword arguments for a kernel that calls `activate_pair`."""
    if isinstance(activation, ClampedSwiGLU):
        return {"ACTIVATION": "clamped", "ALPHA": activation.alpha, "LIMIT": activation.limit}
    return {"ACTIVATION": activation, "ALPHA": 0.0, "LIMIT": 0.0}


@triton.jit
def activate_pair(
    gate,
    up,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    dtype: tl.constexpr,
):
    """The activation of gates and factors in float32, rounded to `dtype` where two kernels would round."""
    gate = widen(gate.to(dtype))
    up = widen(up.to(dtype))
    if ACTIVATION == "clamped":
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return ((up + 1.0) * gate / (1.0 + tl.exp(-ALPHA * gate))).to(dtype)
    activated = widen(activate(gate, ACTIVATION).to(dtype))
    return (activated * up).to(dtype)
