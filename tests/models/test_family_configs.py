"""What published files say is understood, and what would be another model is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphllm.attention.paged import PagedAttention
from graphllm.errors import CheckpointError
from graphllm.kernels.linear import linear_ref
from graphllm.layers.rotary import RotaryConfig
from graphllm.models.config import ModelConfig
from graphllm.models.registry import find_family, read_model_config
from graphllm.models.weights import load_model
from tests.models.equality import CPU
from tests.models.families import (
    COHERE2,
    FALCON,
    FAMILIES,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GPT2,
    GPT_NEOX,
    OLMO3,
    OPT,
    PHI,
    PHI3,
    SMOLLM3,
    STARCODER2,
    FamilyCases,
)
from tests.models.memory_checkpoint import MemoryCheckpoint, as_checkpoint


def checkpoint_of(family: FamilyCases, variant: str | None = None, **keys: Any) -> MemoryCheckpoint:
    """The first variant's checkpoint with other keys in its configuration; None takes a key out."""
    checkpoint = as_checkpoint(family.tiny(variant or next(iter(family.variants))))
    checkpoint.hf_config |= keys
    checkpoint.hf_config = {key: value for key, value in checkpoint.hf_config.items() if value is not None}
    return checkpoint


def read(family: FamilyCases, variant: str | None = None, **keys: Any) -> ModelConfig:
    checkpoint = checkpoint_of(family, variant, **keys)
    return read_model_config(checkpoint, find_family(checkpoint))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_everything_that_transformers_writes_is_understood(family: FamilyCases) -> None:
    """Not only what differs from its defaults."""
    model = family.tiny(next(iter(family.variants)))
    checkpoint = as_checkpoint(model)
    few = read_model_config(checkpoint, find_family(checkpoint))
    checkpoint.hf_config = model.config.to_dict() | {"architectures": [family.architecture]}
    assert read_model_config(checkpoint, find_family(checkpoint)) == few


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_no_family_reads_over_a_key_it_does_not_know(family: FamilyCases) -> None:
    with pytest.raises(CheckpointError, match="'some_key_of_tomorrow'"):
        read(family, some_key_of_tomorrow=3)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_names_a_missing_and_a_left_over_tensor(family: FamilyCases) -> None:
    def refusal(checkpoint: MemoryCheckpoint) -> str:
        with pytest.raises(CheckpointError) as caught:
            load_model(
                checkpoint,
                backend=PagedAttention(block_size=4),
                device=CPU,
                dtype=torch.float32,
                product=linear_ref,
            )
        return caught.value.message

    checkpoint = checkpoint_of(family)
    name = sorted(checkpoint.tensors)[len(checkpoint.tensors) // 2]
    tensor = checkpoint.tensors.pop(name)
    assert f"'{name}' is missing" in refusal(checkpoint)
    checkpoint.tensors[name] = torch.cat((tensor, tensor))
    assert f"'{name}' has shape" in refusal(checkpoint)
    checkpoint.tensors[name] = tensor
    checkpoint.tensors[f"{name}_scale"] = tensor
    assert f"'{name}_scale' is not used" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("family", "keys", "named"),
    [
        (GEMMA2, {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
        (GEMMA2, {"final_logit_softcapping": None}, "final_logit_softcapping"),
        (GEMMA2, {"query_pre_attn_scalar": None}, "query_pre_attn_scalar"),
        (GEMMA2, {"sliding_window_size": 14}, "sliding_window_size"),
        (GEMMA, {"head_dim": None}, "head_dim"),
        (GEMMA, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (GEMMA3, {"sliding_window": None}, "sliding_window"),
        (PHI, {"tie_word_embeddings": True}, "tie_word_embeddings"),
        (PHI, {"rope_parameters": None, "partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        (PHI, {"rope_parameters": None, "partial_rotary_factor": 0.05}, "partial_rotary_factor"),
        (PHI3, {"lm_head_bias": True}, "lm_head_bias"),
        (PHI3, {"attention_bias": True}, "attention_bias"),
        (OLMO3, {"layer_types": ["full_attention"] * 3}, "layer_types"),
        (SMOLLM3, {"no_rope_layers": [1]}, "no_rope_layers"),
        (SMOLLM3, {"no_rope_layers": [1, 2]}, "no_rope_layers"),
        (COHERE2, {"use_parallel_block": False}, "use_parallel_block"),
        (COHERE2, {"logit_scale": 0}, "logit_scale"),
        (STARCODER2, {"norm_type": "rms_norm"}, "norm_type"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2, {"n_embd": "48"}, "n_embd"),
        (GPT2, {"activation_function": "tanh"}, "activation_function"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention"),
        (OPT, {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
        (OPT, {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
        (FALCON, {"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn"),
        (FALCON, {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
        (FALCON, {"num_kv_heads": 3}, "num_kv_heads"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_would_be_another_model_is_refused(
    family: FamilyCases, keys: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError, match=f"'{named}'"):
        read(family, **keys)


def test_older_files_of_gemma_3_mean_what_newer_ones_say() -> None:
    older = read(
        GEMMA3,
        num_hidden_layers=4,
        layer_types=None,
        sliding_window_pattern=2,
        rope_parameters=None,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        cache_implementation="hybrid",
    )
    plain = {"rope_type": "default", "rope_theta": 1e4}
    newer = read(
        GEMMA3,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "sliding_attention": plain,
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    )
    assert older == newer


def test_older_files_of_olmo_3_stretch_full_layers_alone() -> None:
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    config = read(OLMO3, layer_types=None, rope_parameters=None, rope_theta=5e5, rope_scaling=yarn)
    scalings = [layer.rotary and layer.rotary.scaling for layer in config.layers]
    assert scalings[:3] == [None] * 3 and scalings[3] is not None
    assert [layer.sliding_window for layer in config.layers] == [13, 13, 13, None]


def test_older_files_of_phi_3_call_longrope_otherwise() -> None:
    factors = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    keys = {"rope_parameters": None, "original_max_position_embeddings": 64}
    configs = [read(PHI3, rope_scaling={"type": name, **factors}, **keys) for name in ("su", "longrope")]
    assert configs[0] == configs[1]


def test_older_files_of_gpt_neox_call_the_rotary_keys_otherwise() -> None:
    keys = {"rope_parameters": None, "rotary_emb_base": 500, "rotary_pct": 0.5}
    rotary = read(GPT_NEOX, **keys).layers[0].rotary
    assert rotary is not None and (rotary.rotary_dim, rotary.theta) == (6, 500.0)


def test_the_part_that_turns_may_stand_in_the_rotary_parameters_or_beside_them() -> None:
    rope = {"rope_type": "default", "rope_theta": 500.0}
    inside = read(PHI, rope_parameters=rope | {"partial_rotary_factor": 0.5})
    beside = read(PHI, rope_parameters=None, rope_theta=500.0, partial_rotary_factor=0.5)
    assert inside == beside
    assert inside.layers[0].rotary == RotaryConfig(rotary_dim=6, theta=500.0)


def test_published_keys_of_gemma_2_are_understood() -> None:
    keys = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    config = read(GEMMA2, **keys, sliding_window_size=13, cache_implementation="hybrid")
    assert config.activation == "gelu_tanh"
    assert read(GEMMA2, hidden_act="gelu", hidden_activation=None).activation == "gelu_tanh"


def test_published_keys_of_falcon_7b_are_understood() -> None:
    config = read(
        FALCON,
        "one key head",
        activation=None,
        apply_residual_connection_post_layernorm=False,
        ffn_hidden_size=None,
        max_position_embeddings=None,
        num_ln_in_parallel_attn=None,
        rope_parameters=None,
        tie_word_embeddings=None,
    )
    assert (config.max_position_embeddings, config.intermediate_size) == (2048, 4 * 48)
    assert config.tie_word_embeddings and config.activation == "gelu" and config.num_kv_heads == 1


def test_published_keys_of_command_r7b_are_understood() -> None:
    read(
        COHERE2,
        layer_types=None,
        layer_switch=4,
        order_of_interleaved_layers="local_attn_first",
        position_embedding_type="rope_gptj",
        rotary_pct=1.0,
        use_embedding_sharing=True,
        use_gated_activation=True,
        use_parallel_block=True,
        use_parallel_embedding=False,
        cache_implementation="hybrid",
    )


@pytest.mark.parametrize(("family", "prefix"), [(GPT2, "transformer."), (OPT, "model.")])
def test_names_without_the_models_own_prefix_are_found(family: FamilyCases, prefix: str) -> None:
    """As the first published checkpoints have them, with masks that nobody needs."""
    checkpoint = checkpoint_of(family)
    checkpoint.tensors = {name.removeprefix(prefix): tensor for name, tensor in checkpoint.tensors.items()}
    if family is GPT2:
        checkpoint.tensors["h.0.attn.bias"] = torch.ones(1, 1, 512, 512)
    load_model(
        checkpoint,
        backend=PagedAttention(block_size=4),
        device=CPU,
        dtype=torch.float32,
        product=linear_ref,
    )
