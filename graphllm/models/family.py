"""What a model family declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from graphllm.models.config import ModelConfig
from graphllm.models.hf_config import HFConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row of the registry.

    architectures: names in config.json's "architectures" that it answers to. read_config: the mathematics
    from config.json; keys it does not read are refused unless they are known to be harmless.
    weight_names: where a checkpoint keeps the decoder's weights, module of `Decoder` to module of the
    checkpoint, without ".weight" and ".bias"; "{}" stands for the layer's number. ignored_weights: tensors
    that some checkpoints carry and nobody needs, in full.
    """

    architectures: tuple[str, ...]
    read_config: Callable[[HFConfig], ModelConfig]
    weight_names: Mapping[str, str]
    ignored_weights: tuple[str, ...] = ()
