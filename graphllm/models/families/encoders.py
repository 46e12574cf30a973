"""Encoders for embeddings and scores: BERT (Devlin et al., 2018, arXiv:1810.04805), RoBERTa and XLM-RoBERTa
(Liu et al., 2019, arXiv:1907.11692; Conneau et al., 2019, arXiv:1911.02116).

A decoder whose queries see the whole text, with learned positions, norms on sums and one on the embedding.
They differ in the rows of the position table that stand for none and in the layers behind the first token.
"""

from __future__ import annotations

from dataclasses import replace

from graphllm.layers.norm import NormConfig
from graphllm.models.config import ModelConfig
from graphllm.models.family import Family, HeadLayer, Pooling
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_decoder import read_decoder_config

# What the first multilingual files say of a layer that embeddings do not pass.
_KEYS_OF_THE_POOLER = (
    "directionality",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
)


def _read_encoder(config: HFConfig, *, position_offset: int) -> ModelConfig:
    """position_offset: rows of the position table in front of the first position's."""
    config.expect("position_embedding_type", "absolute")
    for key in _KEYS_OF_THE_POOLER:
        config.get(key)
    base = read_decoder_config(
        config,
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        norm=NormConfig(kind="layer", eps=config.positive_float("layer_norm_eps", 1e-12), bias=True),
        rope=None,
        default_activation="gelu",
    )
    num_rows = base.max_position_embeddings
    if num_rows <= position_offset:
        config.refuse("max_position_embeddings", f"is {num_rows}; {position_offset} rows stand for none")
    return replace(
        base,
        is_causal=False,
        norm_placement="sum",
        is_gated=False,
        max_position_embeddings=num_rows - position_offset,
        num_learned_positions=num_rows,
        learned_position_offset=position_offset,
        num_token_types=config.positive_int("type_vocab_size", 2),
        has_embedding_norm=True,
        tie_word_embeddings=False,
        has_head=False,
    )


def read_bert(config: HFConfig) -> ModelConfig:
    """The tokens of one text are of type 0."""
    return _read_encoder(config, position_offset=0)


def read_bert_of_pairs(config: HFConfig) -> ModelConfig:
    """The second of two texts is of type 1, so the embedding has the vocabulary once for each type."""
    base = read_bert(config)
    return replace(
        base, num_used_token_types=base.num_token_types, vocab_size=base.vocab_size * base.num_token_types
    )


def read_roberta(config: HFConfig) -> ModelConfig:
    """Positions are counted from behind the padding token's id; all tokens are of one type."""
    return _read_encoder(config, position_offset=config.non_negative_int("pad_token_id", 1) + 1)


def _weight_names(prefix: str) -> dict[str, str]:
    layer = f"{prefix}encoder.layer.{{}}"
    return {
        "embedding": f"{prefix}embeddings.word_embeddings",
        "embedding.types": f"{prefix}embeddings.token_type_embeddings",
        "positions": f"{prefix}embeddings.position_embeddings",
        "embedding_norm": f"{prefix}embeddings.LayerNorm",
        "layers.{}.attention.qkv.q": f"{layer}.attention.self.query",
        "layers.{}.attention.qkv.k": f"{layer}.attention.self.key",
        "layers.{}.attention.qkv.v": f"{layer}.attention.self.value",
        "layers.{}.attention.output": f"{layer}.attention.output.dense",
        "layers.{}.attention_norm": f"{layer}.attention.output.LayerNorm",
        "layers.{}.mlp.up": f"{layer}.intermediate.dense",
        "layers.{}.mlp.down": f"{layer}.output.dense",
        "layers.{}.mlp_norm": f"{layer}.output.LayerNorm",
        "head": "cls.predictions.decoder",  # of masked tokens: never loaded
    }


def _ignored(prefix: str, *heads: str) -> tuple[str, ...]:
    """The positions' own numbers, the layer that was trained on sentence pairs, and heads."""
    return (
        f"{prefix}embeddings.position_ids",
        f"{prefix}embeddings.token_type_ids",
        f"{prefix}pooler.",
        *heads,
    )


BERT = Family(
    architectures=("BertModel", "BertForMaskedLM"),
    read_config=read_bert,
    weight_names=_weight_names("bert."),
    optional_prefix="bert.",
    ignored_weights=_ignored("bert.", "cls."),
    pooling=Pooling(method="first"),
)
BERT_SCORES = Family(
    architectures=("BertForSequenceClassification",),
    read_config=read_bert_of_pairs,
    weight_names=_weight_names("bert."),
    ignored_weights=_ignored("bert.", "classifier."),
    pooling=Pooling(
        method="first", score_layers=(HeadLayer("bert.pooler.dense", has_tanh=True), HeadLayer("classifier"))
    ),
)
ROBERTA = Family(
    architectures=("RobertaModel", "XLMRobertaModel", "RobertaForMaskedLM", "XLMRobertaForMaskedLM"),
    read_config=read_roberta,
    weight_names=_weight_names("roberta."),
    optional_prefix="roberta.",
    ignored_weights=_ignored("roberta.", "lm_head."),
    pooling=Pooling(method="first"),
)
ROBERTA_SCORES = Family(
    architectures=("RobertaForSequenceClassification", "XLMRobertaForSequenceClassification"),
    read_config=read_roberta,
    weight_names=_weight_names("roberta."),
    ignored_weights=_ignored("roberta.", "classifier."),
    pooling=Pooling(
        method="first",
        score_layers=(HeadLayer("classifier.dense", has_tanh=True), HeadLayer("classifier.out_proj")),
    ),
)
