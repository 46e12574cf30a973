"""Normalization of hidden states, fused with the residual addition before it."""

from __future__ import annotations

import torch
from torch import nn

from graphllm.kernels.rms_norm import add_rms_norm, rms_norm
from graphllm.layers.loadable import LoadableModule, WeightSlot


class RMSNorm(LoadableModule):
    """Root-mean-square norm over the last dimension, with a learned factor for each."""

    def __init__(self, size: int, *, eps: float, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype), requires_grad=False)

    def weight_slots(self) -> dict[str, WeightSlot]:
        return {"weight": WeightSlot(tuple(self.weight.shape), self._load)}

    def _load(self, tensor: torch.Tensor) -> None:
        self.weight.copy_(tensor)

    def forward(self, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        """x: [num_tokens, size]; returns out, of the same shape and dtype."""
        return rms_norm(x, self.weight, eps=self.eps, out=out)

    def add(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        *,
        rows: torch.Tensor | None = None,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Add `x` to `residual` [num_tokens, size] in place and norm the sum into `out`.

        With rows ([num_rows] int64, tokens) out is [num_rows, size], and `residual` is left as it is.
        """
        return add_rms_norm(x, residual, self.weight, eps=self.eps, rows=rows, out=out)
