"""Which family a checkpoint belongs to, and its configuration read by that family."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

from graphllm.errors import CheckpointError
from graphllm.models.config import ModelConfig
from graphllm.models.families.cohere import COHERE, COHERE2
from graphllm.models.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from graphllm.models.families.encoders import BERT, BERT_SCORES, ROBERTA, ROBERTA_SCORES
from graphllm.models.families.falcon import FALCON
from graphllm.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from graphllm.models.families.glm4 import GLM, GLM4
from graphllm.models.families.glm4_moe import GLM4_MOE
from graphllm.models.families.gpt2 import GPT2
from graphllm.models.families.gpt_neox import GPT_NEOX
from graphllm.models.families.gpt_oss import GPT_OSS
from graphllm.models.families.granite import GRANITE
from graphllm.models.families.granite_moe import GRANITE_MOE
from graphllm.models.families.llama import LLAMA
from graphllm.models.families.mistral import MINISTRAL3, MISTRAL
from graphllm.models.families.mixtral import MIXTRAL
from graphllm.models.families.olmo import OLMO2, OLMO3
from graphllm.models.families.olmoe import OLMOE
from graphllm.models.families.opt import OPT
from graphllm.models.families.phi import PHI
from graphllm.models.families.phi3 import PHI3
from graphllm.models.families.pooled import POOLED_DECODERS, QWEN3_RERANKER, VECTORS, without_head
from graphllm.models.families.qwen2 import QWEN2
from graphllm.models.families.qwen2_moe import QWEN2_MOE
from graphllm.models.families.qwen3 import QWEN3
from graphllm.models.families.qwen3_moe import QWEN3_MOE
from graphllm.models.families.seed_oss import SEED_OSS
from graphllm.models.families.smollm3 import SMOLLM3
from graphllm.models.families.stablelm import STABLELM
from graphllm.models.families.starcoder2 import STARCODER2
from graphllm.models.families.text_parts import GEMMA3_TEXT_PART, MISTRAL3_TEXT_PART
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_keys import QUANTIZATION_KEYS
from graphllm.models.sentence_transformers import has_sentence_transformer

FAMILIES = (
    LLAMA,
    MISTRAL,
    MINISTRAL3,
    QWEN2,
    QWEN3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    PHI,
    PHI3,
    GRANITE,
    OLMO2,
    OLMO3,
    SMOLLM3,
    SEED_OSS,
    COHERE,
    COHERE2,
    GLM,
    GLM4,
    STABLELM,
    STARCODER2,
    GPT_NEOX,
    GPT2,
    OPT,
    FALCON,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    OLMOE,
    GRANITE_MOE,
    GLM4_MOE,
    GPT_OSS,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GEMMA3_TEXT_PART,
    MISTRAL3_TEXT_PART,
    *POOLED_DECODERS,
    BERT,
    BERT_SCORES,
    ROBERTA,
    ROBERTA_SCORES,
)
_QWEN3_RERANKER = re.compile("qwen3-reranker", re.IGNORECASE)


class Configured(Protocol):
    """What has config.json's content, read from `path`: a checkpoint, or one without weights."""

    path: Path
    hf_config: dict[str, Any]


def find_family(checkpoint: Configured) -> Family:
    """By "architectures" of the configuration, and by what it was published for.

    A model that generates is served for its embeddings alone where sentence-transformers' files come with
    it, and for its scores where it is a Qwen3-Reranker: its own files look like any other Qwen3's, so that is
    told by its name, or by the key that other servers are told it by.
    Raises CheckpointError that lists what is served.
    """
    architectures = checkpoint.hf_config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise CheckpointError(
            f"{checkpoint.path}: configuration key 'architectures' is {architectures!r}; "
            "it should name one architecture."
        )
    for family in FAMILIES:
        if architectures[0] in family.architectures:
            return _as_published(checkpoint, family)
    served = sorted(name for family in FAMILIES for name in family.architectures)
    raise CheckpointError(
        f"{checkpoint.path}: architecture {architectures[0]!r} is not supported; {', '.join(served)} are."
    )


def _as_published(checkpoint: Configured, family: Family) -> Family:
    if family.pooling is not None:
        return family
    is_named_so = _QWEN3_RERANKER.search(str(checkpoint.path)) is not None
    if family is QWEN3 and (is_named_so or checkpoint.hf_config.get("is_original_qwen3_reranker") is True):
        return QWEN3_RERANKER
    if has_sentence_transformer(checkpoint.path):
        return without_head(family, pooling=VECTORS)
    return family


def read_model_config(checkpoint: Configured, family: Family) -> ModelConfig:
    """The checkpoint's mathematics. Raises CheckpointError for any key that is not understood."""
    reader = HFConfig(checkpoint.hf_config, checkpoint.path)
    for key in QUANTIZATION_KEYS:
        reader.get(key)  # how weights are stored changes no mathematics; `quantization.py` reads it
    config = family.read_config(reader)
    reader.check_understood()
    return config
