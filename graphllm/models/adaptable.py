"""Which layers of a model can have LoRA adapters.

Owns the rule; how adapters name these layers is `adapter_names.py`'s.
"""

from __future__ import annotations

from torch import nn

from graphllm.errors import ConfigError
from graphllm.layers.linear import Linear
from graphllm.models.decoder import Decoder
from graphllm.models.served import ServedModel


def adaptable_layers(model: ServedModel) -> dict[str, Linear]:
    """The linear layers inside a decoder's layers, by path: each sees all of a step's tokens.

    Raises ConfigError for a model that is computed by transformers' modules.
    """
    if not isinstance(model, Decoder):
        raise ConfigError(
            "--enable-lora needs a model that graphllm computes itself; transformers computes this one."
        )
    return linears_of(model)


def linears_of(model: nn.Module) -> dict[str, Linear]:
    """The same of a model that is known to be a decoder."""
    found = ((path, module) for path, module in model.named_modules() if path.startswith("layers."))
    return {path: module for path, module in found if isinstance(module, Linear)}
