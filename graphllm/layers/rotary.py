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
from graphllm.kernels.rotary import QueryGrowth, rotary_tables


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


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE (Ding et al., 2024, arXiv:2402.13753): a divisor for each pair of dimensions.

    short_factors serve a context of up to `original_max_position_embeddings`, long_factors a longer one.
    Which set holds is decided once, by the longest context that is served, and not by each request's
    length: keys in the cache were turned once and for all. attention_factor multiplies cosines and sines.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProportionalRopeScaling:
    """The first `turned_fraction` of the pairs turn, at frequencies divided by `factor`; the others don't.

    Unlike in a partial rotary the pairs are those of the whole head, and so are the exponents.
    """

    turned_fraction: float
    factor: float = 1.0


RopeScaling = (
    LinearRopeScaling | Llama3RopeScaling | YarnRopeScaling | LongRopeScaling | ProportionalRopeScaling
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryConfig:
    """How a layer turns its query and key heads.

    The first `rotary_dim` dimensions of a head turn, an even number; the rest stays. Dimensions i and
    i + rotary_dim / 2 are a point of the plane, or neighbours 2i and 2i + 1 where `is_interleaved`. theta is
    the base of the frequencies. query_growth: whole query heads also grow with their position, and then all
    dimensions of a head turn.
    """

    rotary_dim: int
    theta: float
    scaling: RopeScaling | None = None
    is_interleaved: bool = False
    query_growth: QueryGrowth | None = None

    @property
    def num_tables(self) -> int:
        """Of a step's: cosines and sines, those of queries apart where they grow."""
        return 2 if self.query_growth is None else 4


def rotary_frequencies(rotary: RotaryConfig, *, max_context: int) -> torch.Tensor:
    """Radians a position for each pair of dimensions: [rotary_dim / 2] float32, on the CPU.

    max_context: the longest context that will be served, in tokens.
    """
    # In float32 throughout, as the models were trained: at far positions the rounding is visible.
    exponents = torch.arange(0, rotary.rotary_dim, 2, dtype=torch.float32) / rotary.rotary_dim
    frequencies = 1.0 / rotary.theta**exponents
    scaling = rotary.scaling
    match scaling:
        case None:
            return frequencies
        case LinearRopeScaling():
            return frequencies / scaling.factor
        case LongRopeScaling():
            is_long = max_context > scaling.original_max_position_embeddings
            factors = torch.tensor(scaling.long_factors if is_long else scaling.short_factors)
            return 1.0 / (factors * rotary.theta**exponents)
        case ProportionalRopeScaling():
            num_turned = int(scaling.turned_fraction * rotary.rotary_dim // 2)
            frequencies[num_turned:] = 0.0
            return frequencies / scaling.factor
        case Llama3RopeScaling():
            turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        case YarnRopeScaling():
            kept = 1.0 - _yarn_ramp(rotary.rotary_dim, rotary.theta, scaling=scaling)
    return frequencies * kept + frequencies / scaling.factor * (1.0 - kept)


def _yarn_ramp(rotary_dim: int, theta: float, *, scaling: YarnRopeScaling) -> torch.Tensor:
    """How far each pair of dimensions is interpolated, from 0 (kept) to 1: [rotary_dim / 2] float32."""

    def dimension_turning(num_turns: float) -> float:
        """The (fractional) pair of dimensions that turns so often within the original context."""
        wavelength = scaling.original_max_position_embeddings / num_turns
        return rotary_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension_turning(scaling.beta_fast), dimension_turning(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    width = last - first or 0.001  # the published code's way around a ramp of no width
    return ((torch.arange(rotary_dim // 2, dtype=torch.float32) - first) / width).clamp(0.0, 1.0)


class RotaryEmbedding(nn.Module):
    """The tables of cosines and sines that a step's layers of one kind share.

    Computed for the step's tokens instead of looked up: a table of a long context would weigh as much
    as a layer, and this takes microseconds once a step.
    """

    def __init__(
        self, rotary: RotaryConfig, *, max_context: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.dtype = dtype
        scaling = rotary.scaling
        self.scale = 1.0
        self.query_growth, self.num_tables = rotary.query_growth, rotary.num_tables
        if isinstance(scaling, (YarnRopeScaling, LongRopeScaling)):
            self.scale = scaling.attention_factor
        self.frequencies: torch.Tensor
        frequencies = rotary_frequencies(rotary, max_context=max_context).to(device)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: torch.Tensor, *, arena: Arena, name: str) -> torch.Tensor:
        """positions: [num_tokens] int64; returns the arena's `name`, [2, num_tokens, rotary_dim] as
        `rotary_tables` defines it, or 4 of them where queries grow.
        """
        rotary_dim = 2 * len(self.frequencies)
        out = arena.take(name, self.num_tables, len(positions), rotary_dim, dtype=self.dtype)
        return rotary_tables(
            positions, self.frequencies, scale=self.scale, query_growth=self.query_growth, out=out
        )
