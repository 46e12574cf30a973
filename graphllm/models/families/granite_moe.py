"""Granite 3's models with experts (IBM, 2024): Granite, with each layer's experts in one tensor."""

from __future__ import annotations

from graphllm.layers.moe import MoEConfig
from graphllm.models.config import ModelConfig
from graphllm.models.families.granite import GRANITE
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_moe import read_routing, with_experts


def read_config(config: HFConfig) -> ModelConfig:
    """What is not of the experts is Granite's."""
    base = GRANITE.read_config(config)
    moe = MoEConfig(
        routing=read_routing(config, num_experts="num_local_experts", scoring="softmax", normalizes=True),
        expert_intermediate_size=base.intermediate_size,
        expert_activation=base.activation,
    )
    return with_experts(base, moe)


GRANITE_MOE = Family(
    architectures=("GraniteMoeForCausalLM",),
    read_config=read_config,
    weight_names={
        **GRANITE.weight_names,
        "layers.{}.moe.router.experts": "model.layers.{}.block_sparse_moe.router.layer",
        "layers.{}.moe.gate_up": "model.layers.{}.block_sparse_moe.input_linear",
        "layers.{}.moe.down": "model.layers.{}.block_sparse_moe.output_linear",
    },
    ignored_weights=GRANITE.ignored_weights,
)
