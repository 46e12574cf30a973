"""SmolLM3 (Hugging Face, 2025): Llama of which every fourth layer knows no positions (arXiv:2501.18795)."""

from __future__ import annotations

from dataclasses import replace

from graphllm.models.config import ModelConfig
from graphllm.models.families.llama import LLAMA
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_decoder import read_decoder_config, read_layer_types
from graphllm.models.hf_rope import FULL, SLIDING, RopeDefaults


def _read_turning_layers(config: HFConfig) -> list[bool]:
    """Which layers turn their heads: `no_rope_layers` has a 1 for those that do, whatever its name says."""
    num_layers = config.num_layers()
    every = config.positive_int("no_rope_layer_interval", 4)
    turning = config.get("no_rope_layers", [int((layer + 1) % every != 0) for layer in range(num_layers)])
    if not isinstance(turning, list) or any(value not in (0, 1) for value in turning):
        config.refuse("no_rope_layers", "is not a list of zeros and ones")
    if len(turning) != num_layers:
        config.refuse("no_rope_layers", f"has {len(turning)} entries for {num_layers} layers")
    return [bool(value) for value in turning]


def read_config(config: HFConfig) -> ModelConfig:
    """Windows, where they are used, are those of the layers that do not turn."""
    turning = _read_turning_layers(config)
    config.get("max_window_layers")  # of no effect
    has_window = config.get("sliding_window") is not None
    uses_windows = config.flag("use_sliding_window", default=False) and has_window
    default = [SLIDING if uses_windows and not turns else FULL for turns in turning]
    layer_types = read_layer_types(config, default=default)
    if not uses_windows:
        layer_types = [FULL] * len(turning)
    attention_bias = config.flag("attention_bias", default=False)
    base = read_decoder_config(
        config,
        attention_bias=attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", default=False),
        rope=RopeDefaults(theta=2e6),
        layer_types=layer_types,
        ties_embeddings=True,
    )
    layers = tuple(
        layer if turns else replace(layer, rotary=None)
        for layer, turns in zip(base.layers, turning, strict=True)
    )
    return replace(base, layers=layers)


SMOLLM3 = Family(
    architectures=("SmolLM3ForCausalLM",),
    read_config=read_config,
    weight_names=LLAMA.weight_names,
)
