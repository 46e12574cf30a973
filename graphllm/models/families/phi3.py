"""Phi-3 and Phi-4 (Abdin et al., 2024, arXiv:2404.14219): Llama with merged projections and LongRoPE."""

from __future__ import annotations

from graphllm.models.config import ModelConfig
from graphllm.models.families.llama import LLAMA
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_decoder import read_decoder_config, same_layer_types
from graphllm.models.hf_rope import FULL, SLIDING, RopeDefaults

# What LongRoPE was called before it had its name.
_ROPE = RopeDefaults(may_be_partial=True, type_names={"su": "longrope", "yarn": "longrope"})


def read_config(config: HFConfig) -> ModelConfig:
    """A window is every layer's."""
    for key, value in {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False}.items():
        config.expect(key, value)
    has_window = config.get("sliding_window") is not None
    return read_decoder_config(
        config, rope=_ROPE, layer_types=same_layer_types(config, SLIDING if has_window else FULL)
    )


PHI3 = Family(
    architectures=("Phi3ForCausalLM",),
    read_config=read_config,
    weight_names={
        **LLAMA.weight_names,
        "layers.{}.attention.qkv": "model.layers.{}.self_attn.qkv_proj",
        "layers.{}.mlp.gate_up": "model.layers.{}.mlp.gate_up_proj",
    },
    ignored_weights=LLAMA.ignored_weights,
)
