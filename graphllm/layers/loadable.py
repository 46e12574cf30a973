"""What a layer with weights offers to whoever loads them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from graphllm.quant.scheme import PLAIN_DTYPES, CheckpointTensor


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """A place for one checkpoint tensor: the shape it must have (None for any), and what stores it.

    dtypes: what it may be stored as. is_optional: whether checkpoints may leave it out. tensor: its name
    within its part, where that has dots of its own; else what stands behind the slot's last one.
    """

    shape: tuple[int, ...] | None
    load: Callable[[torch.Tensor], None]
    dtypes: frozenset[torch.dtype] = PLAIN_DTYPES
    is_optional: bool = False
    tensor: str = ""

    @classmethod
    def of(cls, wanted: CheckpointTensor, load: Callable[[torch.Tensor], None], *, tensor: str) -> WeightSlot:
        """The place of what a scheme asks for."""
        return cls(wanted.shape, load, wanted.dtypes, wanted.is_optional, tensor)


class LoadableModule(nn.Module, ABC):
    """A layer that owns parameters itself (and is not only made of layers that do)."""

    @abstractmethod
    def weight_slots(self) -> dict[str, WeightSlot]:
        """Name within the layer ("weight", "q.bias") to slot; together they fill every parameter."""

    def whole_slots(self) -> dict[str, WeightSlot]:
        """The same for checkpoints that store the layer's parts as one tensor, under the layer's own name."""
        return self.weight_slots()
