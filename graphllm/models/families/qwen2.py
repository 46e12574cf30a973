"""Qwen2 and Qwen2.5 (Yang et al., 2024, arXiv:2407.10671): Llama with biases of queries, keys and values."""

from __future__ import annotations

from graphllm.models.config import ModelConfig
from graphllm.models.families.llama import LLAMA
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_decoder import read_decoder_config, read_layer_types
from graphllm.models.hf_rope import FULL, SLIDING


def read_windowed_layers(config: HFConfig) -> list[str]:
    """Layer types where `use_sliding_window` gives layers from `max_window_layers` on a window."""
    num_layers = config.positive_int("num_hidden_layers")
    first = config.get("max_window_layers", num_layers)
    window = config.get("sliding_window")
    uses_windows = config.flag("use_sliding_window", default=False) and window is not None
    default = [SLIDING if uses_windows and layer >= first else FULL for layer in range(num_layers)]
    layer_types = read_layer_types(config, default=default)
    if SLIDING in layer_types and not uses_windows:
        config.refuse("layer_types", "asks for windows, which 'use_sliding_window' denies")
    return layer_types


def read_config(config: HFConfig) -> ModelConfig:
    """The biases are no switch; nothing else has any."""
    return read_decoder_config(config, attention_bias=True, layer_types=read_windowed_layers(config))


QWEN2 = Family(
    architectures=("Qwen2ForCausalLM",),
    read_config=read_config,
    weight_names=LLAMA.weight_names,
    ignored_weights=LLAMA.ignored_weights,
)
