"""Qwen3's models with experts (Qwen Team, 2025, arXiv:2505.09388): dense Qwen3 with none of them shared."""

from __future__ import annotations

from graphllm.layers.moe import MoEConfig
from graphllm.models.config import ModelConfig
from graphllm.models.families.qwen2_moe import EXPERT_NAMES
from graphllm.models.families.qwen3 import QWEN3
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_moe import read_routing, read_sparse_layers, refuse_windows, with_experts

# What some files say of the switches of Qwen2's models with experts.
_EXPECTED = {"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True}


def read_config(config: HFConfig) -> ModelConfig:
    """What is not of the experts is dense Qwen3's."""
    refuse_windows(config)
    for key, value in _EXPECTED.items():
        config.expect(key, value)
    base = QWEN3.read_config(config)
    moe = MoEConfig(
        routing=read_routing(
            config,
            num_experts="num_experts" if config.get("num_local_experts") is None else "num_local_experts",
            scoring="softmax",
            normalizes=config.flag("norm_topk_prob", default=False),
        ),
        expert_intermediate_size=config.positive_int("moe_intermediate_size"),
        expert_activation=base.activation,
    )
    return with_experts(base, moe, layers=read_sparse_layers(config, num_layers=base.num_layers))


QWEN3_MOE = Family(
    architectures=("Qwen3MoeForCausalLM",),
    read_config=read_config,
    weight_names={**QWEN3.weight_names, **EXPERT_NAMES},
    ignored_weights=QWEN3.ignored_weights,
)
