"""Falcon (Almazrouei et al., 2023, arXiv:2311.16867), in its three architectures.

The small old models have ALiBi and a key head for each query head, the 7B model one key head and no other
norm than a layer's first, the later ones groups and a norm each for attention and feed-forward. Files from
before transformers knew the family, and models trained on from them, call the same things otherwise.
"""

from __future__ import annotations

from dataclasses import replace

from graphllm.layers.norm import NormConfig
from graphllm.models.config import ModelConfig
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_decoder import PLAIN_ROPE, read_decoder_config
from graphllm.models.weight_layouts import grouped_qkv


def read_config(config: HFConfig) -> ModelConfig:
    """The switches are not independent: the new architecture is parallel whatever `parallel_attn` says."""
    config.expect("apply_residual_connection_post_layernorm", False)
    is_first = config.get("n_layer") is not None
    config = config.renamed(
        hidden_act="activation",
        intermediate_size="ffn_hidden_size",
        num_key_value_heads="n_head_kv" if is_first else "num_kv_heads",
    )
    if is_first:
        config = config.renamed(num_attention_heads="n_head", num_hidden_layers="n_layer")
    # The first files have no key for it: the 40B model was "RefinedWeb", the others "RefinedWebModel".
    is_new = config.flag("new_decoder_architecture", default=config.get("model_type") == "RefinedWeb")
    has_one_key_head = config.flag("multi_query", default=True) and not is_new
    has_alibi = config.flag("alibi", default=False)
    bias = config.flag("bias", default=False)
    if has_alibi:
        for key in ("rope_parameters", "rope_scaling", "rope_theta"):
            config.get(key)  # of no effect
    base = read_decoder_config(
        config,
        intermediate_size=4 * config.positive_int("hidden_size"),
        max_position_embeddings=2048,  # of no key in the first files
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
        norm=NormConfig(kind="layer", eps=config.positive_float("layer_norm_epsilon"), bias=True),
        rope=None if has_alibi else PLAIN_ROPE,
        default_activation="gelu",
        ties_embeddings=True,
    )
    num_parallel_norms = config.positive_int("num_ln_in_parallel_attn", 2 if is_new else 1)
    is_parallel = config.flag("parallel_attn", default=True)
    if is_new and not is_parallel:
        config.refuse("parallel_attn", "is false, which the new decoder architecture does not know")
    if num_parallel_norms > (2 if is_new else 1):
        config.refuse("num_ln_in_parallel_attn", f"is {num_parallel_norms}, which is not supported")
    return replace(
        base,
        num_kv_heads=1 if has_one_key_head else base.num_kv_heads,
        is_gated=False,
        is_parallel=is_parallel,
        has_parallel_mlp_norm=num_parallel_norms == 2,
        # What ALiBi adds is added before the scores are scaled.
        alibi_scale=base.attention_scale if has_alibi else None,
    )


FALCON = Family(
    architectures=("FalconForCausalLM", "RWForCausalLM"),
    read_config=read_config,
    weight_names={
        "embedding": "transformer.word_embeddings",
        "layers.{}.attention_norm": "transformer.h.{}.input_layernorm",
        "layers.{}.attention.qkv": "transformer.h.{}.self_attention.query_key_value",
        "layers.{}.attention.output": "transformer.h.{}.self_attention.dense",
        "layers.{}.mlp_norm": "transformer.h.{}.post_attention_layernorm",
        "layers.{}.mlp.up": "transformer.h.{}.mlp.dense_h_to_4h",
        "layers.{}.mlp.down": "transformer.h.{}.mlp.dense_4h_to_h",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    alternative_names={
        "layers.{}.attention_norm": "transformer.h.{}.ln_attn",
        "layers.{}.mlp_norm": "transformer.h.{}.ln_mlp",
    },
    layouts={"layers.{}.attention.qkv": grouped_qkv},
    optional_prefix="transformer.",
)
