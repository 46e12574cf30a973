"""Every family without a head: a tiny model of transformers' class, and mutants that must be found out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import transformers
from transformers import PreTrainedModel

from graphllm.models.config import ModelConfig
from tests.models.equality import ConfigMutation, change, layers, norm
from tests.models.memory_checkpoint import TINY_SHAPE, redraw

ENCODER_SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
    "layer_norm_eps": 1e-2,
    "attn_implementation": "eager",
}
HEAD_DIM = {"head_dim": 12}
BIDIRECTIONAL = {"use_bidirectional_attention": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledCase:
    """A tiny model of transformers' class, and mutants that must be found out."""

    architecture: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    shape: Mapping[str, Any] = field(default_factory=lambda: TINY_SHAPE)
    mutants: Mapping[str, ConfigMutation] = field(default_factory=dict)

    def tiny(self) -> PreTrainedModel:
        model_class = getattr(transformers, self.architecture)
        config = model_class.config_class(**(self.shape | self.keys))
        model = model_class(config).eval()
        assert isinstance(model, PreTrainedModel)
        redraw(model, seed=0)
        return model


def causal_mask(config: ModelConfig) -> ModelConfig:
    return replace(config, is_causal=True)


def no_offset(config: ModelConfig) -> ModelConfig:
    return replace(config, learned_position_offset=0)


CASES = {
    "BERT": PooledCase(
        architecture="BertModel",
        shape=ENCODER_SHAPE,
        mutants={
            "a causal mask": causal_mask,
            "another epsilon": norm(eps=1e-12),
            "tanh's gelu": change(activation="gelu_tanh"),
        },
    ),
    "XLM-RoBERTa": PooledCase(
        architecture="XLMRobertaModel",
        shape=ENCODER_SHAPE | {"type_vocab_size": 1},
        mutants={"a causal mask": causal_mask, "positions from the first row": no_offset},
    ),
    "RoBERTa": PooledCase(architecture="RobertaModel", shape=ENCODER_SHAPE),
    "EmbeddingGemma": PooledCase(
        architecture="Gemma3TextModel",
        keys=HEAD_DIM | BIDIRECTIONAL | {"sliding_window": 20, "query_pre_attn_scalar": 16},
        mutants={
            "a causal mask": causal_mask,
            "no window": layers(sliding_window=None),
            "the window to either side": layers(sliding_window=20),
        },
    ),
    "Gemma 3": PooledCase(
        architecture="Gemma3TextModel",
        keys=HEAD_DIM | {"sliding_window": 20, "query_pre_attn_scalar": 16},
        mutants={"sees all": lambda config: replace(layers(sliding_window=None)(config), is_causal=False)},
    ),
    "Qwen3": PooledCase(architecture="Qwen3Model", keys=HEAD_DIM | {"tie_word_embeddings": True}),
    "Qwen2": PooledCase(architecture="Qwen2Model", mutants={"no biases": change(attention_bias=False)}),
    "Mistral": PooledCase(architecture="MistralModel", keys=HEAD_DIM | {"sliding_window": 13}),
    "Llama": PooledCase(architecture="LlamaModel"),
    "Gemma 2": PooledCase(architecture="Gemma2Model", keys=HEAD_DIM | {"sliding_window": 13}),
    "Gemma": PooledCase(architecture="GemmaModel", keys=HEAD_DIM),
    **{
        f"{architecture}, without its head": PooledCase(architecture=architecture, shape=shape)
        for architecture, shape in (
            ("BertForMaskedLM", ENCODER_SHAPE),
            ("RobertaForMaskedLM", ENCODER_SHAPE),
            ("XLMRobertaForMaskedLM", ENCODER_SHAPE),
            ("BertForSequenceClassification", ENCODER_SHAPE),
            ("RobertaForSequenceClassification", ENCODER_SHAPE),
            ("XLMRobertaForSequenceClassification", ENCODER_SHAPE),
            ("LlamaForSequenceClassification", TINY_SHAPE),
            ("MistralForSequenceClassification", TINY_SHAPE | HEAD_DIM),
            ("Qwen2ForSequenceClassification", TINY_SHAPE),
            ("Qwen3ForSequenceClassification", TINY_SHAPE | HEAD_DIM),
            ("GemmaForSequenceClassification", TINY_SHAPE | HEAD_DIM),
            ("Gemma2ForSequenceClassification", TINY_SHAPE | HEAD_DIM),
            ("Gemma3TextForSequenceClassification", TINY_SHAPE | HEAD_DIM),
        )
    },
}
