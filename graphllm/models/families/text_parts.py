"""The text part of models that see images as well: Gemma 3 4B to 27B, Mistral Small 3.1 and 3.2, Ministral 3.

It is a model of text by itself, kept in `text_config` and under names of its own. What reads images is
not loaded, and requests with images are refused as for any other model of text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from graphllm.models.config import ModelConfig
from graphllm.models.families.gemma import GEMMA3
from graphllm.models.families.mistral import MINISTRAL3, MISTRAL
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig

# How images become embeddings, and which tokens stand for them.
_KEYS_OF_IMAGES = (
    "boi_token_id",
    "boi_token_index",
    "eoi_token_id",
    "eoi_token_index",
    "image_token_id",
    "image_token_index",
    "mm_tokens_per_image",
    "multimodal_projector_bias",
    "projector_hidden_act",
    "spatial_merge_size",
    "vision_config",
    "vision_feature_layer",
)
_TENSORS_OF_IMAGES = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)
# What the first published files leave out, because it is what transformers' class says by itself.
_GEMMA3_DEFAULTS = {
    "bos_token_id": 2,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "vocab_size": 262208,
}


def _reader(
    families: Mapping[str, Family], *, defaults: Mapping[str, Any]
) -> Callable[[HFConfig], ModelConfig]:
    """Reads `text_config` as the family of its `model_type` does, the first where it has none; tokens, ties
    and the number format may stand outside it.
    """

    def read_config(config: HFConfig) -> ModelConfig:
        for key in _KEYS_OF_IMAGES:
            config.get(key)
        outside = {"tie_word_embeddings": config.get("tie_word_embeddings")}
        text = config.section("text_config", defaults={**defaults, **outside})
        family: Family = text.choice("model_type", families, default=next(iter(families)))
        base = family.read_config(text)
        text.check_understood()
        config.expect("tie_word_embeddings", base.tie_word_embeddings)
        bos_token_ids = config.token_ids("bos_token_id")
        return replace(
            base,
            dtype=config.dtype() or base.dtype,
            bos_token_id=bos_token_ids[0] if bos_token_ids else base.bos_token_id,
            eos_token_ids=config.token_ids("eos_token_id") or base.eos_token_ids,
        )

    return read_config


def text_part(
    families: Mapping[str, Family], *, architecture: str, defaults: Mapping[str, Any] | None = None
) -> Family:
    """These families inside a model of this architecture, by `model_type`; their tensors are called alike.

    defaults: what `text_config` means where it is silent.
    Published files call "language_model.model.X" what the family calls "model.X"; transformers 5 also
    writes "model.language_model.X".
    """
    family = next(iter(families.values()))
    names = family.weight_names
    return replace(
        family,
        architectures=(architecture,),
        read_config=_reader(families, defaults=defaults or {}),
        weight_names={module: f"language_model.{name}" for module, name in names.items()},
        alternative_names={
            module: name.replace("model.", "model.language_model.", 1) for module, name in names.items()
        },
        ignored_weights=(
            *(f"language_model.{name}" for name in family.ignored_weights),
            *_TENSORS_OF_IMAGES,
        ),
    )


GEMMA3_TEXT_PART = text_part(
    {"gemma3_text": GEMMA3}, architecture="Gemma3ForConditionalGeneration", defaults=_GEMMA3_DEFAULTS
)
MISTRAL3_TEXT_PART = text_part(
    {"mistral": MISTRAL, "ministral3": MINISTRAL3}, architecture="Mistral3ForConditionalGeneration"
)
