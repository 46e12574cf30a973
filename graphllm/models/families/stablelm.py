"""StableLM (Bellagente et al., 2024, arXiv:2402.17834): layer norms, and a quarter of a head turns."""

from __future__ import annotations

from dataclasses import replace

from graphllm.layers.attention import QKNormConfig
from graphllm.layers.norm import NormConfig
from graphllm.models.config import ModelConfig
from graphllm.models.families.llama import LLAMA
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_decoder import read_decoder_config
from graphllm.models.hf_rope import RopeDefaults


def read_config(config: HFConfig) -> ModelConfig:
    """Where queries and keys are normalized, each head has factors of its own and no terms."""
    eps = config.positive_float("layer_norm_eps")
    base = read_decoder_config(
        config,
        attention_bias=config.flag("use_qkv_bias", default=False),
        norm=NormConfig(kind="layer", eps=eps, bias=True),
        rope=RopeDefaults(partial_rotary_factor=0.25),
    )
    qk_norm = None
    if config.flag("qk_layernorm", default=False):
        qk_norm = QKNormConfig(span="each_head", norm=NormConfig(kind="layer", eps=eps))
    is_parallel = config.flag("use_parallel_residual", default=False)
    return replace(base, is_parallel=is_parallel, qk_norm=qk_norm)


STABLELM = Family(
    architectures=("StableLmForCausalLM",),
    read_config=read_config,
    weight_names={
        **LLAMA.weight_names,
        "layers.{}.attention.query_norm.{}": "model.layers.{}.self_attn.q_layernorm.norms.{}",
        "layers.{}.attention.key_norm.{}": "model.layers.{}.self_attn.k_layernorm.norms.{}",
    },
    ignored_weights=LLAMA.ignored_weights,
)
