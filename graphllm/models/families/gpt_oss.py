"""gpt-oss (OpenAI, 2025, arXiv:2508.10925): sinks, windows in every other layer, biases everywhere.

The published checkpoints store experts in MXFP4 (`quant/mxfp4.py`).
"""

from __future__ import annotations

from dataclasses import replace

from graphllm.kernels.expert_activation import ClampedSwiGLU
from graphllm.layers.moe import MoEConfig
from graphllm.models.config import ModelConfig
from graphllm.models.families.llama import LLAMA
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_decoder import read_decoder_config, read_layer_types
from graphllm.models.hf_moe import read_routing, with_experts
from graphllm.models.hf_rope import FULL, SLIDING, RopeDefaults
from graphllm.models.weight_layouts import stacked_pairs, stacked_transposed


def read_config(config: HFConfig) -> ModelConfig:
    """The first layer has a window, the second has none, and so on, unless the file says otherwise."""
    if config.get("experts_per_token", top_k := config.positive_int("num_experts_per_tok")) != top_k:
        config.refuse("experts_per_token", "contradicts 'num_experts_per_tok'")
    config.get("initial_context_length")  # rotary's original context once more
    config.get("sliding_window")  # of no effect where no layer has one
    attention_bias = config.flag("attention_bias", default=True)
    num_layers = config.num_layers()
    alternating = [FULL if layer % 2 else SLIDING for layer in range(num_layers)]
    base = read_decoder_config(
        config,
        attention_bias=attention_bias,
        attention_output_bias=attention_bias,
        rope=RopeDefaults(theta=150000.0),
        layer_types=read_layer_types(config, default=alternating),
    )
    if base.activation != "silu":
        config.refuse("hidden_act", "is not silu, which the experts' activation is made of")
    moe = MoEConfig(
        routing=read_routing(config, num_experts="num_local_experts", scoring="softmax", normalizes=True),
        expert_intermediate_size=base.intermediate_size,
        expert_activation=ClampedSwiGLU(
            alpha=config.positive_float("swiglu_alpha", 1.702),
            limit=config.positive_float("swiglu_limit", 7.0),
        ),
        expert_bias=True,
        router_bias=True,
    )
    return with_experts(replace(base, has_sinks=True), moe)


GPT_OSS = Family(
    architectures=("GptOssForCausalLM",),
    read_config=read_config,
    weight_names={
        **LLAMA.weight_names,
        "layers.{}.attention.sinks.weight": "model.layers.{}.self_attn.sinks",
        "layers.{}.moe.router.experts": "model.layers.{}.mlp.router",
        "layers.{}.moe.gate_up.weight": "model.layers.{}.mlp.experts.gate_up_proj",
        "layers.{}.moe.gate_up.bias": "model.layers.{}.mlp.experts.gate_up_proj_bias",
        "layers.{}.moe.down.weight": "model.layers.{}.mlp.experts.down_proj",
        "layers.{}.moe.down.bias": "model.layers.{}.mlp.experts.down_proj_bias",
    },
    layouts={
        "layers.{}.moe.gate_up": stacked_pairs,
        "layers.{}.moe.down": stacked_transposed,
    },
)
