"""What published files say means to us what it means to transformers, whatever version wrote them.

Each file is shrunk: the same keys, spelled as published, with small sizes. transformers' own class reads it
and makes a random model, and our decoder, which reads the file by itself, has the same logits. Models that
see images are tested in `test_text_parts.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from graphllm.attention.paged import PagedAttention
from graphllm.kernels.linear import linear_ref
from graphllm.models.registry import FAMILIES
from graphllm.models.weights import load_model
from tests.models.equality import CPU, TOLERANCE, error, prompt, theirs
from tests.models.memory_checkpoint import MemoryCheckpoint, as_checkpoint, redraw
from tests.models.paged_model import BLOCK_SIZE, PagedModel
from tests.models.published_configs import PUBLISHED_MODELS
from tests.models.published_model import PublishedModel

NUM_HEADS, HEAD_DIM, HIDDEN_SIZE, VOCAB_SIZE, NUM_LAYERS = 4, 16, 64, 97, 7
SMALL: dict[str, Any] = {
    "experts_per_token": 2,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "head_dim": 24,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 96,
    "kv_lora_rank": 16,
    "moe_intermediate_size": 24,
    "n_embd": HIDDEN_SIZE,
    "n_head": NUM_HEADS,
    "n_layer": 2,
    "n_routed_experts": 8,
    "num_attention_heads": NUM_HEADS,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "rotary_dim": 8,  # half of a head, as in the one file that has it
    "shared_expert_intermediate_size": 40,
    "sliding_window": 13,
    "sliding_window_size": 13,
    "v_head_dim": 12,
    "vocab_size": VOCAB_SIZE,
}


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """The same file of a small model; what is null, zero or left out stays so."""
    small = {key: SMALL[key] if key in SMALL and value else value for key, value in config.items()}
    for key in ("num_key_value_heads", "num_kv_heads"):
        if key in config:
            groups = config["num_attention_heads"] // config[key]
            small[key] = NUM_HEADS if groups == 1 else 1 if config[key] == 1 else NUM_HEADS // 2
    if "num_hidden_layers" in config:
        small["num_hidden_layers"] = min(config["num_hidden_layers"], NUM_LAYERS)
    for key in ("layer_types", "no_rope_layers"):
        if key in config:
            small[key] = config[key][: small["num_hidden_layers"]]
    if config.get("n_group", 1) > 1:
        small |= {"n_group": 4, "topk_group": 2}
    if "first_k_dense_replace" in config:
        small["first_k_dense_replace"] = 1
    if "word_embed_proj_dim" in config:
        is_narrow = config["word_embed_proj_dim"] < config["hidden_size"]
        small["word_embed_proj_dim"] = HIDDEN_SIZE // 2 if is_narrow else HIDDEN_SIZE
    if (config.get("pad_token_id") or 0) >= VOCAB_SIZE:
        small["pad_token_id"] = None
    if isinstance(config.get("rope_scaling"), dict) and "long_factor" in config["rope_scaling"]:
        num_pairs = int(HEAD_DIM * config.get("partial_rotary_factor", 1.0)) // 2
        factors = {key: config["rope_scaling"][key][:num_pairs] for key in ("long_factor", "short_factor")}
        small["rope_scaling"] = config["rope_scaling"] | factors
    return small


def transformers_model(config: dict[str, Any]) -> PreTrainedModel:
    """A random one, as transformers reads the file, after what transformers 5 does not read is put in words
    that it does."""
    values = {key: value for key, value in config.items() if key != "quantization_config"}
    rope = dict(values.get("rope_scaling") or {})
    if rope.get("type") == "su":  # LongRoPE, before it had its name
        values["rope_scaling"] = rope | {"type": "longrope"}
    if rope.pop("attn_factor", None) is not None:  # takes back what yarn does to the scores
        values["rope_scaling"] = rope | {"attention_factor": 1.0}
    model_class = getattr(transformers, config["architectures"][0])
    # The plain attention of transformers adds ALiBi twice.
    implementation = "sdpa" if config.get("alibi") else "eager"
    read = model_class.config_class.from_dict(values, attn_implementation=implementation)
    model: PreTrainedModel = model_class(read).eval().float()
    redraw(model, seed=0)
    return model


def writes_text(model: PublishedModel) -> bool:
    """Models of vectors and scores have no logits of tokens: `test_pooled_families.py` is about them."""
    pooled = {name for family in FAMILIES if family.pooling for name in family.architectures}
    return not pooled.intersection(model.config["architectures"])


@pytest.mark.parametrize(
    "model",
    [model for model in PUBLISHED_MODELS if "text_config" not in model.config and writes_text(model)],
    ids=lambda model: model.name,
)
def test_published_file_means_what_it_means_to_transformers(model: PublishedModel) -> None:
    config, token_ids = shrunk(model.config), prompt(40)
    expected = transformers_model(config)
    backend = PagedAttention(block_size=BLOCK_SIZE)
    decoder = load_model(
        MemoryCheckpoint(config, as_checkpoint(expected).tensors),
        backend=backend,
        device=CPU,
        dtype=torch.float32,
        product=linear_ref,
        max_model_len=1024,  # short for LongRoPE, as the prompt is
    )
    found = PagedModel(decoder, backend).step([(0, token_ids)])
    assert error(found, theirs(expected, token_ids)) < TOLERANCE
