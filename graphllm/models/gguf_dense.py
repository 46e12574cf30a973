"""GGUF's architectures without experts: Hugging Face's names, tensors, and words of their own.

Names of tensors and keys are those of the `gguf` package and of the published converter to GGUF.
"""

from __future__ import annotations

from graphllm.models.gguf_architectures import GGUFArchitecture, TensorRule, rules
from graphllm.models.gguf_arrangements import (
    grouped_by_key,
    key_rows,
    minus_one,
    query_rows,
    transposed,
    value_rows,
)
from graphllm.models.gguf_metadata import GGUFMetadata
from graphllm.models.gguf_rope import LONGROPE_FACTORS
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
    falcon_shape,
    gemma2_attention,
    gemma3_attention,
    gpt_neox_residual,
    granite_multipliers,
    growing_queries,
    no_experts,
    numbers,
    presences,
    stablelm_residual,
    window,
)

_FEED_FORWARD_STEMS = ("ffn_gate", "ffn_up", "ffn_down")
_OUTPUT_NORMS = {
    "blk.{}.post_attention_norm": f"{LAYER}.post_attention_layernorm",
    "blk.{}.post_ffw_norm": f"{LAYER}.post_feedforward_layernorm",
}
_MERGED_ATTENTION = tuple(
    TensorRule(("blk.{}.attn_qkv",), f"{LAYER}.self_attn.{part}_proj", rows)
    for part, rows in (("q", query_rows), ("k", key_rows), ("v", value_rows))
)
_MERGED_MLP = rules(
    {"blk.{}.ffn_up": f"{LAYER}.mlp.gate_up_proj", "blk.{}.ffn_down": f"{LAYER}.mlp.down_proj"}
)
_LLAMA_TENSORS = (*ENDS, *INPUT_NORMS, *PERMUTED_ATTENTION, *MLP)
_LLAMA_BIASES = biases(attention_bias=ATTENTION_STEMS, mlp_bias=_FEED_FORWARD_STEMS)
_GELU_TANH = {"hidden_activation": "gelu_pytorch_tanh"}


def _has_window(metadata: GGUFMetadata) -> bool:
    return metadata.non_negative_int("attention.sliding_window", default=0) > 0


LLAMA = GGUFArchitecture(
    hf_architecture="LlamaForCausalLM",
    model_type="llama",
    tensors=_LLAMA_TENSORS,
    settings=(_LLAMA_BIASES, no_experts),
)
MINISTRAL3 = GGUFArchitecture(
    hf_architecture="Ministral3ForCausalLM",
    model_type="ministral3",
    tensors=_LLAMA_TENSORS,
    settings=(growing_queries, no_experts),
)
SMOLLM3 = GGUFArchitecture(
    hf_architecture="SmolLM3ForCausalLM",
    model_type="smollm3",
    tensors=_LLAMA_TENSORS,
    settings=(_LLAMA_BIASES,),
)
GRANITE = GGUFArchitecture(
    hf_architecture="GraniteForCausalLM",
    model_type="granite",
    tensors=_LLAMA_TENSORS,
    settings=(_LLAMA_BIASES, granite_multipliers, no_experts),
)
QWEN2 = GGUFArchitecture(hf_architecture="Qwen2ForCausalLM", model_type="qwen2", tensors=PLAIN_TENSORS)
QWEN3 = GGUFArchitecture(
    hf_architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    tensors=(*PLAIN_TENSORS, *rules(HEAD_NORMS)),
    settings=(biases(attention_bias=ATTENTION_STEMS),),
)
_OLMO_TENSORS = (*ENDS, *ATTENTION, *MLP, *rules(HEAD_NORMS), *rules(_OUTPUT_NORMS))
OLMO3 = GGUFArchitecture(
    hf_architecture="Olmo3ForCausalLM",
    model_type="olmo3",
    applies=_has_window,
    tensors=_OLMO_TENSORS,
    settings=(biases(attention_bias=ATTENTION_STEMS), window),
)
OLMO2 = GGUFArchitecture(
    hf_architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    tensors=_OLMO_TENSORS,
    settings=(biases(attention_bias=ATTENTION_STEMS),),
)
_GEMMA_NORMS = {
    "output_norm": "model.norm",
    "blk.{}.attn_norm": f"{LAYER}.input_layernorm",
    "blk.{}.ffn_norm": f"{LAYER}.pre_feedforward_layernorm",
    **_OUTPUT_NORMS,
}
_GEMMA_EMBEDDING = rules({"token_embd": "model.embed_tokens", "output": "lm_head"})
_GEMMA_BIASES = biases(attention_bias=ATTENTION_STEMS)
GEMMA = GGUFArchitecture(
    hf_architecture="GemmaForCausalLM",
    model_type="gemma",
    tensors=(
        *_GEMMA_EMBEDDING,
        *ATTENTION,
        *MLP,
        *rules(
            {
                "output_norm": "model.norm",
                "blk.{}.attn_norm": f"{LAYER}.input_layernorm",
                "blk.{}.ffn_norm": f"{LAYER}.post_attention_layernorm",
            },
            minus_one,
        ),
    ),
    constants=_GELU_TANH,
    settings=(_GEMMA_BIASES,),
)
GEMMA2 = GGUFArchitecture(
    hf_architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    tensors=(*_GEMMA_EMBEDDING, *ATTENTION, *MLP, *rules(_GEMMA_NORMS, minus_one)),
    constants=_GELU_TANH,
    settings=(_GEMMA_BIASES, gemma2_attention, window),
)
GEMMA3 = GGUFArchitecture(
    hf_architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    tensors=(
        *_GEMMA_EMBEDDING,
        *ATTENTION,
        *MLP,
        *rules({**_GEMMA_NORMS, **HEAD_NORMS}, minus_one),
    ),
    constants=_GELU_TANH,
    settings=(_GEMMA_BIASES, gemma3_attention, window),
)
PHI2 = GGUFArchitecture(
    hf_architecture="PhiForCausalLM",
    model_type="phi",
    tensors=(
        *ATTENTION[:3],
        *_MERGED_ATTENTION,
        *rules(
            {
                "token_embd": "model.embed_tokens",
                "output_norm": "model.final_layernorm",
                "output": "lm_head",
                "blk.{}.attn_norm": f"{LAYER}.input_layernorm",
                "blk.{}.attn_output": f"{LAYER}.self_attn.dense",
                "blk.{}.ffn_up": f"{LAYER}.mlp.fc1",
                "blk.{}.ffn_down": f"{LAYER}.mlp.fc2",
            }
        ),
    ),
    norm="layer",
    eps_key="layer_norm_eps",
    rotary=PARTIAL,
    constants={"hidden_act": "gelu_new"},
)
PHI3 = GGUFArchitecture(
    hf_architecture="Phi3ForCausalLM",
    model_type="phi3",
    tensors=(
        *ENDS,
        *INPUT_NORMS,
        *_MERGED_MLP,
        *rules(
            {
                "blk.{}.attn_qkv": f"{LAYER}.self_attn.qkv_proj",
                "blk.{}.attn_output": f"{LAYER}.self_attn.o_proj",
            }
        ),
    ),
    rotary=PARTIAL,
    settings=(window,),
    consumed_tensors=frozenset(LONGROPE_FACTORS.values()),
)
STABLELM = GGUFArchitecture(
    hf_architecture="StableLmForCausalLM",
    model_type="stablelm",
    tensors=(
        *PLAIN_TENSORS,
        *rules(
            {
                "blk.{}.attn_q_norm": f"{LAYER}.self_attn.q_layernorm.norms.{{}}",
                "blk.{}.attn_k_norm": f"{LAYER}.self_attn.k_layernorm.norms.{{}}",
            }
        ),
    ),
    norm="layer",
    eps_key="layer_norm_eps",
    rotary=PARTIAL,
    settings=(
        biases(use_qkv_bias=("attn_q", "attn_k", "attn_v")),
        presences(qk_layernorm="attn_q_norm"),
        stablelm_residual,
    ),
)
STARCODER2 = GGUFArchitecture(
    hf_architecture="Starcoder2ForCausalLM",
    model_type="starcoder2",
    tensors=(
        *ENDS,
        *INPUT_NORMS,
        *ATTENTION,
        *rules(
            {"blk.{}.ffn_up": f"{LAYER}.mlp.c_fc", "blk.{}.ffn_down": f"{LAYER}.mlp.c_proj"},
        ),
    ),
    norm="layer",
    eps_key="norm_epsilon",
    # All published models have this window; converters leave it out.
    constants={"hidden_act": "gelu_pytorch_tanh", "sliding_window": 4096},
    settings=(biases(use_bias=(*ATTENTION_STEMS, *_FEED_FORWARD_STEMS)),),
)
COMMAND_R = GGUFArchitecture(
    hf_architecture="CohereForCausalLM",
    model_type="cohere",
    tensors=(*PLAIN_TENSORS, *rules(HEAD_NORMS)),
    norm="layer",
    eps_key="layer_norm_eps",
    settings=(
        biases(attention_bias=ATTENTION_STEMS),
        presences(use_qk_norm="attn_q_norm"),
        numbers(logit_scale="logit_scale"),
    ),
)
COHERE2 = GGUFArchitecture(
    hf_architecture="Cohere2ForCausalLM",
    model_type="cohere2",
    tensors=PLAIN_TENSORS,
    norm="layer",
    eps_key="layer_norm_eps",
    settings=(biases(attention_bias=ATTENTION_STEMS), numbers(logit_scale="logit_scale"), window),
)
GLM4 = GGUFArchitecture(
    hf_architecture="Glm4ForCausalLM",
    model_type="glm4",
    tensors=(
        *ENDS,
        *ATTENTION,
        *_MERGED_MLP,
        *_MERGED_ATTENTION,
        *INPUT_NORMS,
        *rules(
            {
                "blk.{}.post_attention_norm": f"{LAYER}.post_self_attn_layernorm",
                "blk.{}.post_ffw_norm": f"{LAYER}.post_mlp_layernorm",
            }
        ),
    ),
    rotary=PARTIAL,
    settings=(biases(attention_bias=("attn_q", "attn_qkv")),),
)
GLM = GGUFArchitecture(
    hf_architecture="GlmForCausalLM",
    model_type="glm",
    tensors=(*ENDS, *INPUT_NORMS, *ATTENTION, *_MERGED_ATTENTION, *_MERGED_MLP),
    rotary=PARTIAL,
    settings=(biases(attention_bias=("attn_q", "attn_qkv")),),
)
_NEOX_LAYER, _GPT_LAYER = "gpt_neox.layers.{}", "transformer.h.{}"
GPT_NEOX = GGUFArchitecture(
    hf_architecture="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    tensors=(
        TensorRule(("blk.{}.attn_qkv",), f"{_NEOX_LAYER}.attention.query_key_value", grouped_by_key),
        *rules(
            {
                "token_embd": "gpt_neox.embed_in",
                "output_norm": "gpt_neox.final_layer_norm",
                "output": "embed_out",
                "blk.{}.attn_norm": f"{_NEOX_LAYER}.input_layernorm",
                "blk.{}.attn_output": f"{_NEOX_LAYER}.attention.dense",
                "blk.{}.ffn_norm": f"{_NEOX_LAYER}.post_attention_layernorm",
                "blk.{}.ffn_up": f"{_NEOX_LAYER}.mlp.dense_h_to_4h",
                "blk.{}.ffn_down": f"{_NEOX_LAYER}.mlp.dense_4h_to_h",
            }
        ),
    ),
    norm="layer",
    eps_key="layer_norm_eps",
    rotary=PARTIAL,
    constants={"hidden_act": "gelu"},
    settings=(gpt_neox_residual, biases(attention_bias=("attn_qkv",))),
    renames={"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"},
)
GPT2 = GGUFArchitecture(
    hf_architecture="GPT2LMHeadModel",
    model_type="gpt2",
    tensors=(
        *rules(
            {
                "blk.{}.attn_qkv.weight": f"{_GPT_LAYER}.attn.c_attn.weight",
                "blk.{}.attn_output.weight": f"{_GPT_LAYER}.attn.c_proj.weight",
                "blk.{}.ffn_up.weight": f"{_GPT_LAYER}.mlp.c_fc.weight",
                "blk.{}.ffn_down.weight": f"{_GPT_LAYER}.mlp.c_proj.weight",
            },
            transposed,
        ),
        *rules(
            {
                "blk.{}.attn_qkv.bias": f"{_GPT_LAYER}.attn.c_attn.bias",
                "blk.{}.attn_output.bias": f"{_GPT_LAYER}.attn.c_proj.bias",
                "blk.{}.ffn_up.bias": f"{_GPT_LAYER}.mlp.c_fc.bias",
                "blk.{}.ffn_down.bias": f"{_GPT_LAYER}.mlp.c_proj.bias",
                "token_embd": "transformer.wte",
                "position_embd": "transformer.wpe",
                "output_norm": "transformer.ln_f",
                "output": "lm_head",
                "blk.{}.attn_norm": f"{_GPT_LAYER}.ln_1",
                "blk.{}.ffn_norm": f"{_GPT_LAYER}.ln_2",
            }
        ),
    ),
    norm="layer",
    eps_key="layer_norm_epsilon",
    rotary=None,
    constants={"hidden_act": "gelu_new"},
    renames={
        "hidden_act": "activation_function",
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
)
_FALCON_TENSORS = (
    TensorRule(("blk.{}.attn_qkv",), f"{_GPT_LAYER}.self_attention.query_key_value", grouped_by_key),
    *rules(
        {
            "token_embd": "transformer.word_embeddings",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
            "blk.{}.attn_output": f"{_GPT_LAYER}.self_attention.dense",
            "blk.{}.ffn_up": f"{_GPT_LAYER}.mlp.dense_h_to_4h",
            "blk.{}.ffn_down": f"{_GPT_LAYER}.mlp.dense_4h_to_h",
        }
    ),
)
_FALCON_RENAMES = {
    "hidden_act": "activation",
    "intermediate_size": "ffn_hidden_size",
    "num_key_value_heads": "num_kv_heads",
}
_FALCON_SETTINGS = (falcon_shape, biases(bias=("attn_qkv", "attn_output", "ffn_up", "ffn_down")))
FALCON_TWO_NORMS = GGUFArchitecture(
    hf_architecture="FalconForCausalLM",
    model_type="falcon",
    applies=lambda metadata: metadata.has_layer_tensor("attn_norm_2"),
    tensors=(
        *_FALCON_TENSORS,
        *rules({"blk.{}.attn_norm": f"{_GPT_LAYER}.ln_mlp", "blk.{}.attn_norm_2": f"{_GPT_LAYER}.ln_attn"}),
    ),
    norm="layer",
    eps_key="layer_norm_epsilon",
    constants={"hidden_act": "gelu"},
    settings=_FALCON_SETTINGS,
    renames=_FALCON_RENAMES,
)
FALCON = GGUFArchitecture(
    hf_architecture="FalconForCausalLM",
    model_type="falcon",
    tensors=(*_FALCON_TENSORS, *rules({"blk.{}.attn_norm": f"{_GPT_LAYER}.input_layernorm"})),
    norm="layer",
    eps_key="layer_norm_epsilon",
    constants={"hidden_act": "gelu"},
    settings=_FALCON_SETTINGS,
    renames=_FALCON_RENAMES,
)
