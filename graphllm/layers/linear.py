"""A linear layer, or several over the same input merged into one product.

Owns which rows belong to which part. How weights are stored and multiplied is the scheme's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Protocol

import torch

from graphllm.arena import Arena
from graphllm.layers.loadable import LoadableModule, WeightSlot
from graphllm.quant.scheme import LinearScheme


class LayerAdapters(Protocol):
    """What is added to a layer's product for some of a step's tokens; see `lora.py`."""

    @property
    def in_play(self) -> bool:
        """Whether the step at hand has such tokens."""
        ...

    def add(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """x: [num_tokens, in_features]; out: [num_tokens, out_features], what the layer gave."""
        ...


class Linear(LoadableModule):
    """y = x W^T + b.

    parts: name to out_features of each checkpoint layer that is merged here, in the order of the rows;
    the name "" is that of a layer which is not merged. adapters: None where none can be served.
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        *,
        bias: bool,
        scheme: LinearScheme,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.adapters: LayerAdapters | None = None
        self.in_features = in_features
        self.out_features = sum(parts.values())
        self.parts = dict(parts)
        self.has_bias = bias
        self.scheme = scheme
        scheme.create_weights(
            self,
            in_features=in_features,
            out_features=self.out_features,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def weight_slots(self) -> dict[str, WeightSlot]:
        return self._slots(self.parts)

    def whole_slots(self) -> dict[str, WeightSlot]:
        return self._slots({"": self.out_features})

    def _slots(self, parts: Mapping[str, int]) -> dict[str, WeightSlot]:
        slots, first_row = {}, 0
        for part, out_features in parts.items():
            tensors = self.scheme.checkpoint_tensors(self.in_features, out_features, bias=self.has_bias)
            for name, wanted in tensors.items():
                slot = WeightSlot.of(wanted, partial(self._load, name, first_row), tensor=name)
                slots[f"{part}.{name}" if part else name] = slot
            first_row += out_features
        return slots

    def _load(self, name: str, first_row: int, tensor: torch.Tensor) -> None:
        self.scheme.load(self, name, tensor=tensor, first_row=first_row)

    def forward(self, x: torch.Tensor, *, arena: Arena, name: str) -> torch.Tensor:
        """x: [num_tokens, in_features]; returns [num_tokens, sum of the parts], the arena's `name`."""
        out = arena.take(name, x.shape[0], self.out_features, dtype=x.dtype)
        self.project(x, out=out)
        return out

    def project(self, x: torch.Tensor, *, out: torch.Tensor) -> None:
        """The same into `out`, which may be float32 whatever x is."""
        self.scheme.apply(self, x, out=out)
        if self.adapters is not None:
            self.adapters.add(x, out)

    @property
    def is_adapted(self) -> bool:
        """Whether some of the step's tokens want more than the layer's own weights, in this layer."""
        return self.adapters is not None and self.adapters.in_play
