"""A tiny random DeepSeek-V3 checkpoint with the byte-level tokenizer of `tiny_model.py`."""

from __future__ import annotations

from pathlib import Path

from tests.models.moe_families import DEEPSEEK_V3, LATENT_SHAPE
from tests.tiny_model import VOCAB_SIZE, write_tiny_model

LAYERS = LATENT_SHAPE["num_hidden_layers"]
WIDTH = LATENT_SHAPE["kv_lora_rank"] + LATENT_SHAPE["qk_rope_head_dim"]


def write_latent_model(folder: Path) -> Path:
    """Write the checkpoint into `folder` (created) and return it."""
    write_tiny_model(folder)
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    model = DEEPSEEK_V3.tiny(
        "queries from a latent, yarn",
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=None,
    )
    model.save_pretrained(folder)
    return folder
