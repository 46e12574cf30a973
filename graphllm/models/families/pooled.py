"""Decoder families published for embeddings and scores: the same layers without a head.

Owns what changes in a declaration when the head goes: names without a prefix, the flags that let a query
see later tokens, and the layer that makes scores of the last token's state.
"""

from __future__ import annotations

from dataclasses import replace

from graphllm.models.config import ModelConfig
from graphllm.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from graphllm.models.families.llama import LLAMA
from graphllm.models.families.mistral import MISTRAL
from graphllm.models.families.qwen2 import QWEN2
from graphllm.models.families.qwen3 import QWEN3
from graphllm.models.family import Family, HeadLayer, Pooling
from graphllm.models.hf_config import HFConfig

_PREFIX = "model."


def without_head(family: Family, *architectures: str, pooling: Pooling, prefix: str = _PREFIX) -> Family:
    """The family's declaration for a checkpoint that gives `pooling` instead of tokens.

    architectures: that it answers to, by default the family's own. prefix: begins the names in some
    checkpoints, where the family has none of its own.
    """

    def read_config(config: HFConfig) -> ModelConfig:
        # Two keys say it, in files of different makers.
        sees_all = not config.flag("is_causal", default=True)
        has_halved_windows = config.flag("use_bidirectional_attention", default=False)
        base = replace(family.read_config(config), has_head=False, head_bias=False, tie_word_embeddings=False)
        if has_halved_windows:
            return _seeing_all(_with_halved_windows(base), config)
        if sees_all and any(layer.sliding_window is not None for layer in base.layers):
            config.refuse("is_causal", "is false, beside windows; what they then are is not known")
        return _seeing_all(base, config) if sees_all else base

    head = family.weight_names["head"]
    return replace(
        family,
        architectures=architectures or family.architectures,
        read_config=read_config,
        optional_prefix=family.optional_prefix or prefix,
        ignored_weights=(
            *family.ignored_weights,
            f"{head}.",
            *(f"{layer.name}." for layer in pooling.score_layers),
        ),
        pooling=pooling,
    )


def _with_halved_windows(base: ModelConfig) -> ModelConfig:
    """EmbeddingGemma's: as wide as before, half of them on either side, the query's own token in both."""
    layers = (
        layer
        if layer.sliding_window is None
        else replace(layer, sliding_window=layer.sliding_window // 2 + 1)
        for layer in base.layers
    )
    return replace(base, layers=tuple(layers))


def _seeing_all(base: ModelConfig, config: HFConfig) -> ModelConfig:
    if base.alibi_scale is not None or base.latent is not None:
        config.refuse("is_causal", "is false, which is not supported for this kind of attention")
    return replace(base, is_causal=False)


VECTORS = Pooling(method="last")
_SCORES = Pooling(method="last", score_layers=(HeadLayer("score"),))

LLAMA_VECTORS = without_head(LLAMA, "LlamaModel", pooling=VECTORS)
MISTRAL_VECTORS = without_head(MISTRAL, "MistralModel", pooling=VECTORS)
QWEN2_VECTORS = without_head(QWEN2, "Qwen2Model", pooling=VECTORS)
QWEN3_VECTORS = without_head(QWEN3, "Qwen3Model", pooling=VECTORS)
GEMMA_VECTORS = without_head(GEMMA, "GemmaModel", pooling=VECTORS)
GEMMA2_VECTORS = without_head(GEMMA2, "Gemma2Model", pooling=VECTORS)
GEMMA3_VECTORS = without_head(GEMMA3, "Gemma3TextModel", pooling=Pooling(method="mean"))
LLAMA_SCORES = without_head(LLAMA, "LlamaForSequenceClassification", pooling=_SCORES)
MISTRAL_SCORES = without_head(MISTRAL, "MistralForSequenceClassification", pooling=_SCORES)
QWEN2_SCORES = without_head(QWEN2, "Qwen2ForSequenceClassification", pooling=_SCORES)
QWEN3_SCORES = without_head(QWEN3, "Qwen3ForSequenceClassification", pooling=_SCORES)
GEMMA_SCORES = without_head(GEMMA, "GemmaForSequenceClassification", pooling=_SCORES)
GEMMA2_SCORES = without_head(GEMMA2, "Gemma2ForSequenceClassification", pooling=_SCORES)
GEMMA3_SCORES = without_head(GEMMA3, "Gemma3TextForSequenceClassification", pooling=_SCORES)
# Qwen3-Reranker is published as a model that generates "yes" or "no" (arXiv:2506.05176).
QWEN3_RERANKER = without_head(QWEN3, pooling=Pooling(method="last", score_tokens=("no", "yes")))
POOLED_DECODERS = (
    LLAMA_VECTORS,
    MISTRAL_VECTORS,
    QWEN2_VECTORS,
    QWEN3_VECTORS,
    GEMMA_VECTORS,
    GEMMA2_VECTORS,
    GEMMA3_VECTORS,
    LLAMA_SCORES,
    MISTRAL_SCORES,
    QWEN2_SCORES,
    QWEN3_SCORES,
    GEMMA_SCORES,
    GEMMA2_SCORES,
    GEMMA3_SCORES,
)
