"""Published models that see images as well: only their text part is served, and counted."""

from __future__ import annotations

from typing import Any

from tests.models.published_llama_configs import MISTRAL
from tests.models.published_model import PublishedModel, shape, with_keys

GEMMA_3_VISION = {
    "hidden_size": 1152,
    "image_size": 896,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "vision_use_head": False,
}


def gemma_3(hidden_size: int, *, layers: int, **text: Any) -> dict[str, Any]:
    """The first files leave out what their class says by itself."""
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": hidden_size,
            "intermediate_size": 4 * hidden_size,
            "model_type": "gemma3_text",
            "num_hidden_layers": layers,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
            **text,
        },
        "torch_dtype": "bfloat16",
        "vision_config": GEMMA_3_VISION,
    }


MISTRAL_SMALL_31: dict[str, Any] = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "image_token_index": 10,
    "model_type": "mistral3",
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "text_config": with_keys(
        {key: value for key, value in MISTRAL.items() if key not in ("architectures", "tie_word_embeddings")},
        **shape(5120, 32768, layers=40, heads=32, key_heads=8),
        head_dim=128,
        max_position_embeddings=131072,
        rope_theta=1000000000.0,
        vocab_size=131072,
    ),
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1024, "image_size": 1540, "model_type": "pixtral", "patch_size": 14},
    "vision_feature_layer": -1,
}


def ministral_3(*sizes: int, layers: int, is_tied: bool = False) -> dict[str, Any]:
    """sizes: of hidden states and within the feed-forward layer."""
    text = {
        **shape(*sizes, layers=layers, heads=32, key_heads=8),
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 262144,
        "model_type": "ministral3",
        "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 16.0,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16384,
            "rope_theta": 1000000.0,
            "rope_type": "yarn",
            "type": "yarn",
        },
        "sliding_window": None,
        "use_cache": True,
        "vocab_size": 131072,
    }
    return MISTRAL_SMALL_31 | {
        "dtype": "bfloat16",
        "text_config": text | ({"tie_word_embeddings": True} if is_tied else {}),
        "tie_word_embeddings": is_tied,
        "transformers_version": "5.0.0.dev0",
    }


TEXT_PART_MODELS = (
    PublishedModel("google/gemma-3-4b-it", 3_880_099_328, gemma_3(2560, layers=34)),
    PublishedModel(
        "google/gemma-3-12b-it",
        11_765_788_416,
        gemma_3(3840, layers=48, num_attention_heads=16, num_key_value_heads=8),
    ),
    PublishedModel(
        "google/gemma-3-27b-it",
        27_009_002_240,
        gemma_3(
            5376,
            layers=62,
            head_dim=128,
            num_attention_heads=32,
            num_key_value_heads=16,
            query_pre_attn_scalar=168,
        ),
    ),
    PublishedModel("mistralai/Mistral-Small-3.1-24B-Instruct-2503", 23_572_403_200, MISTRAL_SMALL_31),
    PublishedModel(
        "mistralai/Ministral-3-3B-Base-2512", 3_429_000_000, ministral_3(3072, 9216, layers=26, is_tied=True)
    ),
    PublishedModel("mistralai/Ministral-3-8B-Base-2512", 8_490_000_000, ministral_3(4096, 14336, layers=34)),
)
