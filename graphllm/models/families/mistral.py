"""Mistral and Ministral (Jiang et al., 2023, arXiv:2310.06825): Llama, in places with a sliding window.

Ministral 3 (2025) stretches its frequencies, and its queries grow with their position.
"""

from __future__ import annotations

from graphllm.models.config import ModelConfig
from graphllm.models.families.llama import LLAMA
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_decoder import read_decoder_config, read_layer_types, same_layer_types
from graphllm.models.hf_rope import FULL, SLIDING, RopeDefaults


def read_config(config: HFConfig) -> ModelConfig:
    """Without `layer_types`, a window is every layer's."""
    has_window = config.get("sliding_window") is not None
    every_layer = same_layer_types(config, SLIDING if has_window else FULL)
    return read_decoder_config(config, layer_types=read_layer_types(config, default=every_layer))


def read_ministral3(config: HFConfig) -> ModelConfig:
    """A window is every layer's."""
    has_window = config.get("sliding_window") is not None
    every_layer = same_layer_types(config, SLIDING if has_window else FULL)
    rope = RopeDefaults(theta=1e6, may_grow=True)
    return read_decoder_config(config, layer_types=every_layer, rope=rope)


MISTRAL = Family(
    architectures=("MistralForCausalLM", "MinistralForCausalLM"),
    read_config=read_config,
    weight_names=LLAMA.weight_names,
    ignored_weights=LLAMA.ignored_weights,
)
MINISTRAL3 = Family(
    architectures=("Ministral3ForCausalLM",),
    read_config=read_ministral3,
    weight_names=LLAMA.weight_names,
)
