"""What a layer with weights offers to whoever loads them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """A place for one checkpoint tensor: the shape it must have, and what stores it."""

    shape: tuple[int, ...]
    load: Callable[[torch.Tensor], None]


class LoadableModule(nn.Module, ABC):
    """A layer that owns parameters itself (and is not only made of layers that do)."""

    @abstractmethod
    def weight_slots(self) -> dict[str, WeightSlot]:
        """Name within the layer ("weight", "q.bias") to slot; together they fill every parameter."""

    def whole_slots(self) -> dict[str, WeightSlot]:
        """The same for checkpoints that store the layer's parts as one tensor, under the layer's own name."""
        return self.weight_slots()
