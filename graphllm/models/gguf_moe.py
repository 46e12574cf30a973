"""GGUF's architectures with experts, like the others in `gguf_dense.py`.

GGUF stacks a layer's experts in one tensor for each projection.
"""

from __future__ import annotations

from graphllm.models.gguf_architectures import GGUFArchitecture, RotaryStyle, TensorRule, rules
from graphllm.models.gguf_arrangements import key_value_heads, one_row, paired_rows, stacked_rows, transposed
from graphllm.models.gguf_metadata import GGUFMetadata
from graphllm.models.gguf_rules import (
    ATTENTION,
    ATTENTION_STEMS,
    ENDS,
    HEAD_NORMS,
    INPUT_NORMS,
    LAYER,
    MLP,
    PARTIAL,
    PERMUTED_ATTENTION,
    PLAIN_TENSORS,
)
from graphllm.models.gguf_settings import (
    biases,
    deepseek_experts,
    deepseek_v2_routing,
    equal_expert_size,
    expert_size,
    glm4_routing,
    granite_multipliers,
    is_sigmoid,
    latent_attention,
    mixture,
    normalized_weights,
    plain_softmax,
    presences,
    shared_expert_size,
    window,
)

_EXPERTS = rules(
    {
        "blk.{}.ffn_gate_inp": f"{LAYER}.mlp.gate",
        "blk.{}.ffn_gate_exps": f"{LAYER}.mlp.experts.{{}}.gate_proj",
        "blk.{}.ffn_up_exps": f"{LAYER}.mlp.experts.{{}}.up_proj",
        "blk.{}.ffn_down_exps": f"{LAYER}.mlp.experts.{{}}.down_proj",
    }
)
_SHARED_EXPERTS = rules(
    {
        "blk.{}.ffn_gate_shexp": f"{LAYER}.mlp.shared_experts.gate_proj",
        "blk.{}.ffn_up_shexp": f"{LAYER}.mlp.shared_experts.up_proj",
        "blk.{}.ffn_down_shexp": f"{LAYER}.mlp.shared_experts.down_proj",
    }
)
_SELECTION_BIAS = rules({"blk.{}.exp_probs_b.bias": f"{LAYER}.mlp.gate.e_score_correction_bias"})


def _has_experts(metadata: GGUFMetadata) -> bool:
    return metadata.non_negative_int("expert_count", default=0) > 0


MIXTRAL = GGUFArchitecture(
    hf_architecture="MixtralForCausalLM",
    model_type="mixtral",
    applies=_has_experts,
    tensors=(
        *ENDS,
        *INPUT_NORMS,
        *PERMUTED_ATTENTION,
        *rules(
            {
                "blk.{}.ffn_gate_inp": f"{LAYER}.block_sparse_moe.gate",
                "blk.{}.ffn_gate_exps": f"{LAYER}.block_sparse_moe.experts.{{}}.w1",
                "blk.{}.ffn_up_exps": f"{LAYER}.block_sparse_moe.experts.{{}}.w3",
                "blk.{}.ffn_down_exps": f"{LAYER}.block_sparse_moe.experts.{{}}.w2",
                # The first files had a tensor for each expert.
                "blk.{}.ffn_gate.{}": f"{LAYER}.block_sparse_moe.experts.{{}}.w1",
                "blk.{}.ffn_up.{}": f"{LAYER}.block_sparse_moe.experts.{{}}.w3",
                "blk.{}.ffn_down.{}": f"{LAYER}.block_sparse_moe.experts.{{}}.w2",
            }
        ),
    ),
    settings=(mixture("num_local_experts"), equal_expert_size, plain_softmax),
)
GRANITE_MOE = GGUFArchitecture(
    hf_architecture="GraniteMoeForCausalLM",
    model_type="granitemoe",
    tensors=(
        *ENDS,
        *INPUT_NORMS,
        *PERMUTED_ATTENTION,
        *rules(
            {
                "blk.{}.ffn_gate_inp": f"{LAYER}.block_sparse_moe.router.layer",
                "blk.{}.ffn_down_exps": f"{LAYER}.block_sparse_moe.output_linear",
            }
        ),
        TensorRule(
            ("blk.{}.ffn_gate_exps", "blk.{}.ffn_up_exps"),
            f"{LAYER}.block_sparse_moe.input_linear",
            stacked_rows,
        ),
    ),
    settings=(
        biases(attention_bias=ATTENTION_STEMS),
        granite_multipliers,
        mixture("num_local_experts"),
        equal_expert_size,
        plain_softmax,
    ),
)
QWEN2_MOE = GGUFArchitecture(
    hf_architecture="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    tensors=(
        *PLAIN_TENSORS,
        *_EXPERTS,
        TensorRule(("blk.{}.ffn_gate_inp_shexp",), f"{LAYER}.mlp.shared_expert_gate", one_row),
        *rules(
            {
                "blk.{}.ffn_gate_shexp": f"{LAYER}.mlp.shared_expert.gate_proj",
                "blk.{}.ffn_up_shexp": f"{LAYER}.mlp.shared_expert.up_proj",
                "blk.{}.ffn_down_shexp": f"{LAYER}.mlp.shared_expert.down_proj",
            }
        ),
    ),
    settings=(
        biases(qkv_bias=("attn_q",)),
        mixture("num_experts"),
        expert_size,
        shared_expert_size,
        normalized_weights(default=False),
        plain_softmax,
    ),
)
QWEN3_MOE = GGUFArchitecture(
    hf_architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    tensors=(*PLAIN_TENSORS, *rules(HEAD_NORMS), *_EXPERTS),
    settings=(
        biases(attention_bias=ATTENTION_STEMS),
        mixture("num_experts"),
        expert_size,
        normalized_weights(default=True),
        plain_softmax,
    ),
)
OLMOE = GGUFArchitecture(
    hf_architecture="OlmoeForCausalLM",
    model_type="olmoe",
    tensors=(*ENDS, *INPUT_NORMS, *ATTENTION, *rules(HEAD_NORMS), *_EXPERTS),
    settings=(
        biases(attention_bias=ATTENTION_STEMS),
        mixture("num_experts"),
        equal_expert_size,
        normalized_weights(default=False),
        plain_softmax,
    ),
)
GLM4_MOE = GGUFArchitecture(
    hf_architecture="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    tensors=(
        *ENDS,
        *ATTENTION,
        *MLP,
        *rules(HEAD_NORMS),
        *_EXPERTS,
        *_SHARED_EXPERTS,
        *_SELECTION_BIAS,
        *rules(
            {
                "blk.{}.attn_norm": f"{LAYER}.input_layernorm",
                "blk.{}.post_attention_norm": f"{LAYER}.post_attention_layernorm",
            }
        ),
    ),
    rotary=PARTIAL,
    settings=(
        biases(attention_bias=("attn_q",)),
        presences(use_qk_norm="attn_q_norm"),
        mixture("n_routed_experts"),
        expert_size,
        normalized_weights(default=True),
        deepseek_experts,
        glm4_routing,
    ),
)
GPT_OSS = GGUFArchitecture(
    hf_architecture="GptOssForCausalLM",
    model_type="gpt_oss",
    tensors=(
        *ENDS,
        *ATTENTION,
        TensorRule(
            ("blk.{}.ffn_gate_exps.weight", "blk.{}.ffn_up_exps.weight"),
            f"{LAYER}.mlp.experts.gate_up_proj",
            paired_rows,
        ),
        TensorRule(
            ("blk.{}.ffn_gate_exps.bias", "blk.{}.ffn_up_exps.bias"),
            f"{LAYER}.mlp.experts.gate_up_proj_bias",
            paired_rows,
        ),
        TensorRule(("blk.{}.ffn_down_exps.weight",), f"{LAYER}.mlp.experts.down_proj", transposed),
        *rules(
            {
                "blk.{}.ffn_down_exps.bias": f"{LAYER}.mlp.experts.down_proj_bias",
                "blk.{}.ffn_gate_inp": f"{LAYER}.mlp.router",
                "blk.{}.attn_sinks.weight": f"{LAYER}.self_attn.sinks",
                "blk.{}.attn_norm": f"{LAYER}.input_layernorm",
                "blk.{}.post_attention_norm": f"{LAYER}.post_attention_layernorm",
            }
        ),
    ),
    # The published models do not round YaRN's bounds; no file says so.
    rotary=RotaryStyle(truncates_yarn=False),
    settings=(mixture("num_local_experts"), equal_expert_size, window, plain_softmax),
)
_DEEPSEEK_TENSORS = (
    *ENDS,
    *INPUT_NORMS,
    *MLP,
    *_EXPERTS,
    *_SHARED_EXPERTS,
    *rules(
        {
            "blk.{}.attn_q": f"{LAYER}.self_attn.q_proj",
            "blk.{}.attn_q_a": f"{LAYER}.self_attn.q_a_proj",
            "blk.{}.attn_q_b": f"{LAYER}.self_attn.q_b_proj",
            "blk.{}.attn_q_a_norm": f"{LAYER}.self_attn.q_a_layernorm",
            "blk.{}.attn_kv_a_mqa": f"{LAYER}.self_attn.kv_a_proj_with_mqa",
            "blk.{}.attn_kv_a_norm": f"{LAYER}.self_attn.kv_a_layernorm",
            "blk.{}.attn_kv_b": f"{LAYER}.self_attn.kv_b_proj",
            "blk.{}.attn_output": f"{LAYER}.self_attn.o_proj",
        }
    ),
    TensorRule(("blk.{}.attn_k_b", "blk.{}.attn_v_b"), f"{LAYER}.self_attn.kv_b_proj", key_value_heads),
)
_DEEPSEEK_SETTINGS = (latent_attention, mixture("n_routed_experts"), expert_size, deepseek_experts)
DEEPSEEK_V3 = GGUFArchitecture(
    hf_architecture="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    applies=is_sigmoid,
    tensors=(*_DEEPSEEK_TENSORS, *_SELECTION_BIAS),
    has_latent_heads=True,
    settings=(*_DEEPSEEK_SETTINGS, normalized_weights(default=False)),
)
DEEPSEEK_V2 = GGUFArchitecture(
    hf_architecture="DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    tensors=_DEEPSEEK_TENSORS,
    has_latent_heads=True,
    settings=(*_DEEPSEEK_SETTINGS, normalized_weights(default=False), deepseek_v2_routing),
)
