"""Normalization of hidden states and of heads, fused with the residual addition where one precedes it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from graphllm.kernels.layer_norm import add_layer_norm, layer_norm
from graphllm.kernels.rms_norm import add_rms_norm, rms_norm
from graphllm.layers.loadable import LoadableModule, WeightSlot


@dataclass(frozen=True, slots=True, kw_only=True)
class NormConfig:
    """One kind of norm: x by its root mean square ("rms"), or x less its mean by its deviation ("layer").

    Each dimension has a learned factor, 1 + weight with `unit_offset` (rms only), and a learned term with
    `bias` (layer only).
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float
    unit_offset: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        assert self.kind == "rms" or not self.unit_offset, "layer norms have plain factors"
        assert self.kind == "layer" or not self.bias, "root-mean-square norms have no bias"


class Norm(LoadableModule):
    """A norm over the last dimension. weight: [size], or [num_heads, size] where heads differ."""

    eps: float
    unit_offset: bool = False

    def __init__(self, *size: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*size, device=device, dtype=dtype), requires_grad=False)

    @property
    def neutral_weight(self) -> float:
        """The weight that changes nothing."""
        return 0.0 if self.unit_offset else 1.0

    def weight_slots(self) -> dict[str, WeightSlot]:
        """With a weight of its own for each head, one slot a head: "0.weight" and so on."""
        if self.weight.ndim == 1:
            return self.whole_slots()
        return {
            f"{head}.weight": WeightSlot(tuple(weight.shape), partial(_copy, weight))
            for head, weight in enumerate(self.weight)
        }

    def whole_slots(self) -> dict[str, WeightSlot]:
        return {
            name: WeightSlot(tuple(parameter.shape), partial(_copy, parameter))
            for name, parameter in self.named_parameters()
        }

    @abstractmethod
    def forward(self, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        """x: [..., size], any stride between tokens; returns out, of x's shape and dtype, or x itself."""

    @abstractmethod
    def add(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        *,
        scale: float = 1.0,
        rows: torch.Tensor | None = None,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Add scale * x to `residual` [num_tokens, size] in place and norm the sum into `out`.

        With rows ([num_rows] int64, tokens) out is [num_rows, size], and `residual` is left as it is.
        """


def _copy(to: torch.Tensor, tensor: torch.Tensor) -> None:
    to.copy_(tensor)


class RMSNorm(Norm):
    """Root-mean-square norm, with a learned factor for each dimension."""

    def __init__(
        self, *size: int, eps: float, unit_offset: bool = False, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(*size, device=device, dtype=dtype)
        self.eps = eps
        self.unit_offset = unit_offset

    def forward(self, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        """See `Norm`."""
        return rms_norm(x, self.weight, eps=self.eps, unit_offset=self.unit_offset, out=out)

    def add(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        *,
        scale: float = 1.0,
        rows: torch.Tensor | None = None,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """See `Norm`."""
        return add_rms_norm(
            x,
            residual,
            self.weight,
            eps=self.eps,
            unit_offset=self.unit_offset,
            scale=scale,
            rows=rows,
            out=out,
        )


class LayerNorm(Norm):
    """Mean and deviation taken out, with a learned factor and perhaps a learned term for each dimension."""

    def __init__(self, *size: int, eps: float, bias: bool, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(*size, device=device, dtype=dtype)
        self.eps = eps
        self.bias: nn.Parameter | None = None
        if bias:
            values = torch.empty(*size, device=device, dtype=dtype)
            self.bias = nn.Parameter(values, requires_grad=False)

    def forward(self, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        """See `Norm`."""
        return layer_norm(x, self.weight, self.bias, eps=self.eps, out=out)

    def add(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        *,
        scale: float = 1.0,
        rows: torch.Tensor | None = None,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """See `Norm`."""
        return add_layer_norm(
            x, residual, self.weight, self.bias, eps=self.eps, scale=scale, rows=rows, out=out
        )


def make_norm(*size: int, config: NormConfig, device: torch.device, dtype: torch.dtype) -> Norm:
    """The norm that `config` describes, over the last of `size`."""
    if config.kind == "layer":
        return LayerNorm(*size, eps=config.eps, bias=config.bias, device=device, dtype=dtype)
    return RMSNorm(*size, eps=config.eps, unit_offset=config.unit_offset, device=device, dtype=dtype)
