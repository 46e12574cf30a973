"""Qwen1.5-MoE and Qwen2-MoE (Qwen Team, 2024, arXiv:2407.10671): a gated shared expert beside the others."""

from __future__ import annotations

from graphllm.layers.moe import MoEConfig
from graphllm.models.config import ModelConfig
from graphllm.models.families.llama import LLAMA
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_decoder import read_decoder_config
from graphllm.models.hf_moe import read_routing, read_sparse_layers, refuse_windows, with_experts

EXPERT_NAMES = {
    "layers.{}.moe.router.experts": "model.layers.{}.mlp.gate",
    "layers.{}.moe.gate_up.{}.gate": "model.layers.{}.mlp.experts.{}.gate_proj",
    "layers.{}.moe.gate_up.{}.up": "model.layers.{}.mlp.experts.{}.up_proj",
    "layers.{}.moe.down.{}": "model.layers.{}.mlp.experts.{}.down_proj",
}
"""Where most families keep their experts."""


def read_config(config: HFConfig) -> ModelConfig:
    """Query, key and value have biases, unless the file says otherwise."""
    refuse_windows(config)
    base = read_decoder_config(config, attention_bias=config.flag("qkv_bias", default=True))
    moe = MoEConfig(
        routing=read_routing(
            config,
            num_experts="num_experts",
            scoring="softmax",
            normalizes=config.flag("norm_topk_prob", default=False),
        ),
        expert_intermediate_size=config.positive_int("moe_intermediate_size"),
        expert_activation=base.activation,
        shared_intermediate_size=config.positive_int("shared_expert_intermediate_size"),
        shared_activation=base.activation,
        has_shared_gate=True,
    )
    return with_experts(base, moe, layers=read_sparse_layers(config, num_layers=base.num_layers))


QWEN2_MOE = Family(
    architectures=("Qwen2MoeForCausalLM",),
    read_config=read_config,
    weight_names={
        **LLAMA.weight_names,
        **EXPERT_NAMES,
        "layers.{}.moe.router.shared_gate": "model.layers.{}.mlp.shared_expert_gate",
        "layers.{}.moe.shared.gate_up.gate": "model.layers.{}.mlp.shared_expert.gate_proj",
        "layers.{}.moe.shared.gate_up.up": "model.layers.{}.mlp.shared_expert.up_proj",
        "layers.{}.moe.shared.down": "model.layers.{}.mlp.shared_expert.down_proj",
    },
    ignored_weights=LLAMA.ignored_weights,
)
