"""Root-mean-square normalization (Zhang and Sennrich, 2019, arXiv:1910.07467).

    y_i = x_i / sqrt(mean_j(x_j^2) + eps) * weight_i

The mean and the division run in float32; the result is rounded to x's dtype before it is multiplied by
the weight, as the models were trained.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_ref(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x: [..., hidden] of any floating dtype, weight: [hidden]. Returns x's shape and dtype."""
    wide = x.float()
    # One reduction without a temporary for the squares, then in place on one number a row.
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # [..., 1] float32
    scale = scale.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """See `rms_norm_ref`."""
    return rms_norm_ref(x, weight, eps=eps)
