"""Which layers of a model can have LoRA adapters.

Owns the rule; how adapters name these layers is `adapter_names.py`'s.
"""

from __future__ import annotations

from graphllm.layers.linear import Linear
from graphllm.models.decoder import Decoder
from graphllm.models.served import ServedModel


def adaptable_layers(model: ServedModel) -> dict[str, Linear]:
    """The linear layers inside a decoder's layers, by path: each sees all of a step's tokens."""
    assert isinstance(model, Decoder), "transformers' modules have no places for adapters"
    found = ((path, module) for path, module in model.named_modules() if path.startswith("layers."))
    return {path: module for path, module in found if isinstance(module, Linear)}
