"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), in the half-split layout.

With d = head_dim and i < d / 2, dimensions i and i + d / 2 of a head are a point of the plane, turned by
the angle a_i = position * inverse_frequency_i:

    y_i         = x_i         * cos(a_i) - x_{i + d/2} * sin(a_i)
    y_{i + d/2} = x_{i + d/2} * cos(a_i) + x_i         * sin(a_i)

Owns the angles' tables of one step and the turn. Which frequencies a model has is `layers/rotary.py`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(
    positions: Tensor, inverse_frequencies: Tensor, *, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines for one step, to be shared by all layers.

    positions: [num_tokens] int64; inverse_frequencies: [head_dim / 2] float32; scale multiplies both.
    Returns cos and signed_sin, [num_tokens, 1, head_dim] of `dtype`; both halves of cos are the same,
    and the first half of signed_sin is negated, so that the turn is x * cos + swapped(x) * signed_sin.
    """
    angles = positions.float()[:, None, None] * inverse_frequencies  # [num_tokens, 1, head_dim / 2]
    cos, sin = angles.cos().mul_(scale), angles.sin_().mul_(scale)
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotary_ref(heads: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Turn heads by their tokens' angles.

    heads: [num_tokens, num_heads, head_dim], query and key heads alike, any strides; cos and signed_sin
    as `rotary_tables` returns them. Returns a new contiguous tensor of heads' shape and dtype.
    """
    swapped = torch.roll(heads, heads.shape[-1] // 2, dims=-1)  # [num_tokens, num_heads, head_dim]
    return torch.mul(heads, cos).addcmul_(swapped, signed_sin)


def rotary(heads: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """See `rotary_ref`."""
    return rotary_ref(heads, cos, signed_sin)
