"""Weights made wrong on purpose."""

from __future__ import annotations

import torch

from graphllm.layers.linear import Linear
from graphllm.models.decoder import Decoder
from tests.models.equality import WeightMutation


def without_head_of_its_own(model: Decoder) -> None:
    """The embedding in place of the head."""
    assert model.head is not None
    model.head.get_parameter("weight").copy_(model.embedding.weight)


def without_bias(module: str) -> WeightMutation:
    """Every linear layer of this name without its bias."""

    def mutate(model: Decoder) -> None:
        found = [
            part
            for path, part in model.named_modules()
            if path.endswith(f".{module}") and isinstance(part, Linear)
        ]
        assert found and all(isinstance(part.bias, torch.Tensor) for part in found), module
        for part in found:
            part.get_parameter("bias").zero_()

    return mutate
