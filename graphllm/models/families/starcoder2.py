"""StarCoder2 (Lozhkov et al., 2024, arXiv:2402.19173): layer norms, biases, no gate, and a window."""

from __future__ import annotations

from dataclasses import replace

from graphllm.layers.norm import NormConfig
from graphllm.models.config import ModelConfig
from graphllm.models.families.llama import LLAMA
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_decoder import read_decoder_config, same_layer_types
from graphllm.models.hf_rope import FULL, SLIDING


def read_config(config: HFConfig) -> ModelConfig:
    """One switch covers all biases but those of norms; a window is every layer's."""
    config.expect("mlp_type", "default")
    config.expect("norm_type", "layer_norm")
    config.expect("scale_attn_weights", True)
    config.expect("layer_norm_epsilon", config.get("norm_epsilon"))  # the same once more
    config.get("activation_function")  # left over from the first StarCoder; `hidden_act` is what holds
    bias = config.flag("use_bias", default=True)
    has_window = config.get("sliding_window") is not None
    base = read_decoder_config(
        config,
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
        norm=NormConfig(kind="layer", eps=config.positive_float("norm_epsilon"), bias=True),
        layer_types=same_layer_types(config, SLIDING if has_window else FULL),
        ties_embeddings=True,
    )
    return replace(base, is_gated=False)


STARCODER2 = Family(
    architectures=("Starcoder2ForCausalLM",),
    read_config=read_config,
    weight_names={
        **LLAMA.weight_names,
        "layers.{}.mlp.up": "model.layers.{}.mlp.c_fc",
        "layers.{}.mlp.down": "model.layers.{}.mlp.c_proj",
    },
)
