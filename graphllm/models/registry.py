"""Which family a checkpoint belongs to, and its configuration read by that family."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from graphllm.errors import CheckpointError
from graphllm.models.config import ModelConfig
from graphllm.models.families.llama import LLAMA
from graphllm.models.families.qwen3 import QWEN3
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig

FAMILIES = (LLAMA, QWEN3)


class Configured(Protocol):
    """What has config.json's content, read from `path`: a checkpoint, or one without weights."""

    path: Path
    hf_config: dict[str, Any]


def find_family(checkpoint: Configured) -> Family:
    """By "architectures" of the configuration. Raises CheckpointError that lists what is served."""
    architectures = checkpoint.hf_config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise CheckpointError(
            f"{checkpoint.path}: configuration key 'architectures' is {architectures!r}; "
            "it should name one architecture."
        )
    for family in FAMILIES:
        if architectures[0] in family.architectures:
            return family
    served = sorted(name for family in FAMILIES for name in family.architectures)
    raise CheckpointError(
        f"{checkpoint.path}: architecture {architectures[0]!r} is not supported; {', '.join(served)} are."
    )


def read_model_config(checkpoint: Configured, family: Family) -> ModelConfig:
    """The checkpoint's mathematics. Raises CheckpointError for any key that is not understood."""
    reader = HFConfig(checkpoint.hf_config, checkpoint.path)
    config = family.read_config(reader)
    reader.check_understood()
    return config
