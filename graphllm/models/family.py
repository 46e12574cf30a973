"""What a model family declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from graphllm.layers.loadable import WeightSlot
from graphllm.models.config import ModelConfig
from graphllm.models.hf_config import HFConfig

WeightLayout = Callable[[WeightSlot, ModelConfig], WeightSlot]
"""A decoder's place for a tensor to the checkpoint's: another shape, or the same numbers in another order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row of the registry.

    architectures: names in config.json's "architectures" that it answers to. read_config: the mathematics
    from config.json; keys it does not read are refused unless they are known to be harmless.
    weight_names: where a checkpoint keeps the decoder's weights, module of `Decoder` to module of the
    checkpoint, without ".weight" and ".bias"; "{}" stands for a number, that of the layer first. A tensor
    that is not called so is named in full, "weight" or "bias" of `Decoder`'s to the checkpoint's. A merged
    layer is named part by part, or as a whole where the checkpoint has it merged too.
    alternative_names: a module's other name, for checkpoints that have that one. layouts: what is stored
    otherwise than the decoder has it, by module of `Decoder`. optional_prefix: begins the names in some
    checkpoints and not in others. ignored_weights: tensors that some checkpoints carry and nobody
    needs, in full; with a dot at the end, all whose names begin so. spare_layers: begins the names of layers;
    those behind the model's last are not used.
    """

    architectures: tuple[str, ...]
    read_config: Callable[[HFConfig], ModelConfig]
    weight_names: Mapping[str, str]
    alternative_names: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, WeightLayout] = field(default_factory=dict)
    optional_prefix: str = ""
    spare_layers: str = ""
    ignored_weights: tuple[str, ...] = ()
