"""The families that are served of models which see images as well: variants and mutants, as in `families.py`.

Their configurations have a section for text and one for images.
"""

from __future__ import annotations

from typing import Any

from tests.models.equality import change, layers, rotary
from tests.models.families import GROWTH, NO_WINDOW, WINDOW, YARN, FamilyCases, qk_norm
from tests.models.memory_checkpoint import TINY_SHAPE
from tests.models.mutations import without_head_of_its_own

TINY_TEXT = {key: value for key, value in TINY_SHAPE.items() if key != "attn_implementation"}
TINY_EYE = {
    "hidden_size": 16,
    "image_size": 28,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "patch_size": 14,
}


def gemma3_text(**keys: Any) -> dict[str, Any]:
    """Seven layers, of which the sixth sees everything."""
    text = {"head_dim": 16, "num_hidden_layers": 7, "query_pre_attn_scalar": 20, "tie_word_embeddings": True}
    return {"text_config": TINY_TEXT | text | WINDOW | keys}


def mistral_text(**keys: Any) -> dict[str, Any]:
    """Heads that do not fill the hidden size."""
    text = TINY_TEXT | {"head_dim": 16, "model_type": "mistral", "sliding_window": None} | keys
    return {"text_config": text, "tie_word_embeddings": text["tie_word_embeddings"]}


GEMMA3_TEXT_PART = FamilyCases(
    name="Gemma 3 with images",
    models="Gemma 3 4B, 12B and 27B, MedGemma; text only",
    architecture="Gemma3ForConditionalGeneration",
    shape={"attn_implementation": "eager"},
    base={
        "mm_tokens_per_image": 1,
        "vision_config": TINY_EYE | {"model_type": "siglip_vision_model", "vision_use_head": False},
    },
    variants={
        "stretched frequencies of full layers": gemma3_text(
            rope_scaling={"rope_type": "linear", "factor": 8.0}, rope_theta=1000.0, rope_local_base_freq=10.0
        ),
        "a short window": gemma3_text(sliding_window=5),
    },
    config_mutants={
        "no stretching": ("stretched frequencies of full layers", rotary(scaling=None)),
        "one base": ("stretched frequencies of full layers", rotary(theta=10.0)),
        "no window": ("a short window", NO_WINDOW),
        "another window": ("a short window", layers(sliding_window=6)),
        "factors of norms without 1": ("a short window", qk_norm(unit_offset=False)),
        "no scaled embeddings": ("stretched frequencies of full layers", change(embedding_multiplier=None)),
    },
)
MISTRAL3_TEXT_PART = FamilyCases(
    name="Mistral 3 with images",
    models="Mistral Small 3.1 and 3.2, Magistral Small, Devstral Small 1 and 2, Ministral 3; text only",
    architecture="Mistral3ForConditionalGeneration",
    shape={"attn_implementation": "eager"},
    base={"vision_config": TINY_EYE | {"head_dim": 8, "model_type": "pixtral"}},
    variants={
        "full attention": mistral_text(),
        "a window": mistral_text(**WINDOW),
        "queries grow": mistral_text(model_type="ministral3", rope_parameters=YARN | GROWTH),
    },
    config_mutants={
        "no window": ("a window", NO_WINDOW),
        "no growth": ("queries grow", rotary(query_growth=None)),
        "turns by another base": ("full attention", rotary(theta=10.0)),
        "scale of the hidden size": ("full attention", change(attention_scale=12**-0.5)),
    },
    weight_mutants={"the embedding for a head": ("full attention", without_head_of_its_own)},
)
TEXT_PART_FAMILIES = (GEMMA3_TEXT_PART, MISTRAL3_TEXT_PART)
