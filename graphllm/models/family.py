"""What a model family declares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from graphllm.layers.loadable import WeightSlot
from graphllm.models.config import ModelConfig
from graphllm.models.hf_config import HFConfig

WeightLayout = Callable[[WeightSlot, ModelConfig], WeightSlot]
"""A decoder's place for a tensor to the checkpoint's: another shape, or the same numbers in another order."""

PoolingMethod = Literal["first", "last", "mean", "mean_sqrt", "max"]
"""How the hidden states of a text's tokens become one: that of its first or last token; their mean; their
sum by the root of their number; the largest of each dimension."""


@dataclass(frozen=True, slots=True)
class HeadLayer:
    """One linear layer behind pooling. name: its module in the checkpoint; has_tanh: bounded by it."""

    name: str
    has_tanh: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """What a family without logits gives: a vector for each text, or a score for each of several labels.

    method: where nothing else is published with the weights. score_layers: from the pooled state to the
    scores; none for families of vectors. score_tokens: two words of the vocabulary; the score is how much
    likelier the second is to follow, by the head's own rows for them.
    """

    method: PoolingMethod
    score_layers: tuple[HeadLayer, ...] = ()
    score_tokens: tuple[str, str] | None = None


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
    pooling: what it gives instead of tokens; None for families that generate. Its layers are not the
    decoder's: they are `ignored_weights` here, and loaded by `pooling.py`.
    """

    architectures: tuple[str, ...]
    read_config: Callable[[HFConfig], ModelConfig]
    weight_names: Mapping[str, str]
    alternative_names: Mapping[str, str] = field(default_factory=dict)
    layouts: Mapping[str, WeightLayout] = field(default_factory=dict)
    optional_prefix: str = ""
    spare_layers: str = ""
    ignored_weights: tuple[str, ...] = ()
    pooling: Pooling | None = None
