"""Which declarations a value of general.architecture stands for."""

from __future__ import annotations

from collections.abc import Mapping

from graphllm.models.gguf_architectures import GGUFArchitecture
from graphllm.models.gguf_dense import (
    COHERE2,
    COMMAND_R,
    FALCON,
    FALCON_TWO_NORMS,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GLM,
    GLM4,
    GPT2,
    GPT_NEOX,
    GRANITE,
    LLAMA,
    MINISTRAL3,
    OLMO2,
    OLMO3,
    PHI2,
    PHI3,
    QWEN2,
    QWEN3,
    SMOLLM3,
    STABLELM,
    STARCODER2,
)
from graphllm.models.gguf_moe import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GLM4_MOE,
    GPT_OSS,
    GRANITE_MOE,
    MIXTRAL,
    OLMOE,
    QWEN2_MOE,
    QWEN3_MOE,
)

ARCHITECTURES: Mapping[str, tuple[GGUFArchitecture, ...]] = {
    "chatglm": (GLM,),
    "cohere2": (COHERE2,),
    "command-r": (COMMAND_R,),
    "deepseek2": (DEEPSEEK_V3, DEEPSEEK_V2),
    "falcon": (FALCON_TWO_NORMS, FALCON),
    "gemma": (GEMMA,),
    "gemma2": (GEMMA2,),
    "gemma3": (GEMMA3,),
    "glm4": (GLM4,),
    "glm4moe": (GLM4_MOE,),
    "gpt-oss": (GPT_OSS,),
    "gpt2": (GPT2,),
    "gptneox": (GPT_NEOX,),
    "granite": (GRANITE,),
    "granitemoe": (GRANITE_MOE,),
    "llama": (MIXTRAL, LLAMA),
    "mistral3": (MINISTRAL3,),
    "olmo2": (OLMO3, OLMO2),
    "olmoe": (OLMOE,),
    "phi2": (PHI2,),
    "phi3": (PHI3,),
    "qwen2": (QWEN2,),
    "qwen2moe": (QWEN2_MOE,),
    "qwen3": (QWEN3,),
    "qwen3moe": (QWEN3_MOE,),
    "smollm3": (SMOLLM3,),
    "stablelm": (STABLELM,),
    "starcoder2": (STARCODER2,),
}
"""By the value of general.architecture; of several declarations the first that applies is the file's."""
