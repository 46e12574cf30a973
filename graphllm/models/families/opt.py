"""OPT (Zhang et al., 2022, arXiv:2205.01068): learned positions from row 2 on, ReLU, and two odd sizes.

The 350M model normalizes sums instead of inputs, and its embeddings are narrower than its stream.
"""

from __future__ import annotations

from dataclasses import replace

from graphllm.layers.norm import NormConfig
from graphllm.models.config import ModelConfig
from graphllm.models.families.llama import LLAMA
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_decoder import read_decoder_config

_EPS = 1e-5  # of no key
_POSITION_OFFSET = 2


def read_config(config: HFConfig) -> ModelConfig:
    """One switch covers all biases but those of norms."""
    config.expect("layer_norm_elementwise_affine", True)
    config.expect("_remove_final_layer_norm", False)
    config.expect("learned_embeddings", True)  # of the positions, in Galactica's files
    config.expect("scale_embeddings", False)
    bias = config.flag("enable_bias", default=True)
    base = read_decoder_config(
        config.renamed(hidden_act="activation_function", intermediate_size="ffn_dim"),
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
        norm=NormConfig(kind="layer", eps=_EPS, bias=True),
        rope=None,
        default_activation="relu",
        ties_embeddings=True,
    )
    embedding_size = config.positive_int("word_embed_proj_dim", base.hidden_size)
    norms_inputs = config.flag("do_layer_norm_before", default=True)
    return replace(
        base,
        norm_placement="input" if norms_inputs else "sum",
        is_gated=False,
        embedding_size=None if embedding_size == base.hidden_size else embedding_size,
        num_learned_positions=base.max_position_embeddings + _POSITION_OFFSET,
        learned_position_offset=_POSITION_OFFSET,
    )


OPT = Family(
    architectures=("OPTForCausalLM",),
    read_config=read_config,
    weight_names={
        **{
            module: name.replace("model.", "model.decoder.", 1) for module, name in LLAMA.weight_names.items()
        },
        "positions": "model.decoder.embed_positions",
        "embedding_projection": "model.decoder.project_in",
        "layers.{}.attention_norm": "model.decoder.layers.{}.self_attn_layer_norm",
        "layers.{}.attention.output": "model.decoder.layers.{}.self_attn.out_proj",
        "layers.{}.mlp_norm": "model.decoder.layers.{}.final_layer_norm",
        "layers.{}.mlp.up": "model.decoder.layers.{}.fc1",
        "layers.{}.mlp.down": "model.decoder.layers.{}.fc2",
        "final_norm": "model.decoder.final_layer_norm",
        "head_projection": "model.decoder.project_out",
    },
    optional_prefix="model.",
)
