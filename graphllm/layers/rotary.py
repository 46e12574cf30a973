"""Which rotary frequencies a model uses, and their tables for a step.

Owns the ways of stretching the frequencies beyond the context a model was pretrained on. The turn itself
is `kernels/rotary.py`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from graphllm.arena import Arena
from graphllm.kernels.rotary import rotary_tables


@dataclass(frozen=True, slots=True)
class LinearRopeScaling:
    """All frequencies divided by `factor` (Chen et al., 2023, arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3RopeScaling:
    """Long wavelengths stretched by `factor`, short ones kept, a blend between (Llama 3.1's code).

    A wavelength is short when it turns more than `high_freq_factor` times within the original context,
    long when it turns less than `low_freq_factor` times.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnRopeScaling:
    """YaRN (Peng et al., 2023, arXiv:2309.00071): a blend by dimension, and sharper attention.

    `attention_factor` multiplies cosines and sines. A dimension that turns more than `beta_fast` times
    within the original context is kept, one below `beta_slow` turns is divided by `factor`; `truncate`
    rounds the two bounds outwards to whole dimensions.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


RopeScaling = LinearRopeScaling | Llama3RopeScaling | YarnRopeScaling


def inverse_frequencies(head_dim: int, theta: float, *, scaling: RopeScaling | None) -> torch.Tensor:
    """Radians a position for each pair of dimensions: [head_dim / 2] float32, on the CPU."""
    # In float32 throughout, as the models were trained: at far positions the rounding is visible.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    match scaling:
        case None:
            return frequencies
        case LinearRopeScaling():
            return frequencies / scaling.factor
        case Llama3RopeScaling():
            turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        case YarnRopeScaling():
            kept = 1.0 - _yarn_ramp(head_dim, theta, scaling=scaling)
    return frequencies * kept + frequencies / scaling.factor * (1.0 - kept)


def _yarn_ramp(head_dim: int, theta: float, *, scaling: YarnRopeScaling) -> torch.Tensor:
    """How far each pair of dimensions is interpolated, from 0 (kept) to 1: [head_dim / 2] float32."""

    def dimension_turning(num_turns: float) -> float:
        """The (fractional) pair of dimensions that turns so often within the original context."""
        wavelength = scaling.original_max_position_embeddings / num_turns
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension_turning(scaling.beta_fast), dimension_turning(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001  # the published code's way around a ramp of no width
    return ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / width).clamp(0.0, 1.0)


class RotaryEmbedding(nn.Module):
    """The tables of cosines and sines that all layers of a step share.

    Computed for the step's tokens instead of looked up: a table of a long context would weigh as much
    as a layer, and this takes microseconds once a step.
    """

    def __init__(
        self,
        head_dim: int,
        theta: float,
        *,
        scaling: RopeScaling | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.scale = scaling.attention_factor if isinstance(scaling, YarnRopeScaling) else 1.0
        self.inverse_frequencies: torch.Tensor
        frequencies = inverse_frequencies(head_dim, theta, scaling=scaling).to(device)
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)

    def forward(self, positions: torch.Tensor, *, arena: Arena) -> torch.Tensor:
        """positions: [num_tokens] int64; returns [2, num_tokens, head_dim] as `rotary_tables` defines it."""
        head_dim = 2 * len(self.inverse_frequencies)
        out = arena.take("rotary", 2, len(positions), head_dim, dtype=self.dtype)
        return rotary_tables(positions, self.inverse_frequencies, scale=self.scale, out=out)
