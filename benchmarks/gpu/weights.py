"""Random weights by their Hugging Face names: the same for us, for transformers and for a plain loop.

Owns names, shapes and draws, a generator for each tensor, so that any of them can be drawn by itself.
`checkpoint.py` writes them to a folder, peers take them as they are; the same device kind gives the same
bits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from benchmarks.gpu.floors import shape_path

STANDARD_DEVIATION = 0.02
SEED = 20261


def read_shape(name: str) -> dict[str, Any]:
    """A benchmarked model's config.json."""
    config: dict[str, Any] = json.loads(shape_path(name).read_text(encoding="utf-8"))
    return config


def weight_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor in a checkpoint of a Llama or Qwen3 model."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.self_attn.q_proj.weight": (heads * head_dim, hidden),
            f"{name}.self_attn.k_proj.weight": (kv_heads * head_dim, hidden),
            f"{name}.self_attn.v_proj.weight": (kv_heads * head_dim, hidden),
            f"{name}.self_attn.o_proj.weight": (hidden, heads * head_dim),
            f"{name}.post_attention_layernorm.weight": (hidden,),
            f"{name}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{name}.mlp.up_proj.weight": (intermediate, hidden),
            f"{name}.mlp.down_proj.weight": (hidden, intermediate),
        }
        if config.get("model_type") == "qwen3":
            shapes[f"{name}.self_attn.q_norm.weight"] = (head_dim,)
            shapes[f"{name}.self_attn.k_norm.weight"] = (head_dim,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def draw_weights(
    config: Mapping[str, Any], device: torch.device, *, dtype: torch.dtype = torch.bfloat16
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor, one at a time: norms are 1, all else is normal with STANDARD_DEVIATION around 0."""
    generator = torch.Generator(device)
    for index, (name, shape) in enumerate(weight_shapes(config).items()):
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if len(shape) == 1:
            tensor.fill_(1.0)
        else:
            generator.manual_seed(SEED + index)
            tensor.normal_(0.0, STANDARD_DEVIATION, generator=generator)
        yield name, tensor
