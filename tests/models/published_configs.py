"""Published models: what their config.json says, and how large they are. The table; its rows are next door.

Facts, collected from the models' own files and pages: the keys that the files have, less what every file
says and nobody reads (`initializer_range`, `transformers_version`). Sizes are in parameters, a tied head
counted once.
"""

from __future__ import annotations

from tests.models.published_dense_configs import (
    COHERE_MODELS,
    GLM_MODELS,
    GRANITE_MODELS,
    OLMO_MODELS,
    SEED_OSS_MODELS,
    SMOLLM3_MODELS,
)
from tests.models.published_gemma_configs import GEMMA_MODELS, PHI_3_MODELS
from tests.models.published_llama_configs import LLAMA_MODELS, MISTRAL_MODELS, QWEN2_MODELS, QWEN3_MODELS
from tests.models.published_moe_configs import (
    DEEPSEEK_MODELS,
    GPT_OSS_AND_OTHER_MODELS,
    MIXTRAL_AND_QWEN_MODELS,
)
from tests.models.published_older_configs import (
    FALCON_MODELS,
    GPT2_MODELS,
    GPT_NEOX_MODELS,
    OPT_MODELS,
    PHI_MODELS,
    STABLELM_MODELS,
    STARCODER2_MODELS,
)
from tests.models.published_pooled_configs import BERT_MODELS, DECODERS_WITHOUT_HEAD, ROBERTA_MODELS
from tests.models.published_text_parts import TEXT_PART_MODELS

PUBLISHED_MODELS = (
    *LLAMA_MODELS,
    *MISTRAL_MODELS,
    *QWEN2_MODELS,
    *QWEN3_MODELS,
    *GEMMA_MODELS,
    *PHI_MODELS,
    *PHI_3_MODELS,
    *OLMO_MODELS,
    *GRANITE_MODELS,
    *COHERE_MODELS,
    *GLM_MODELS,
    *SMOLLM3_MODELS,
    *SEED_OSS_MODELS,
    *GPT2_MODELS,
    *OPT_MODELS,
    *GPT_NEOX_MODELS,
    *FALCON_MODELS,
    *STABLELM_MODELS,
    *STARCODER2_MODELS,
    *MIXTRAL_AND_QWEN_MODELS,
    *GPT_OSS_AND_OTHER_MODELS,
    *DEEPSEEK_MODELS,
    *TEXT_PART_MODELS,
    *BERT_MODELS,
    *ROBERTA_MODELS,
    *DECODERS_WITHOUT_HEAD,
)
