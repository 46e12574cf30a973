"""Which family a checkpoint belongs to, and its configuration read by that family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphllm.errors import CheckpointError
from graphllm.models.config import ModelConfig
from graphllm.models.families.llama import LLAMA
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig

if TYPE_CHECKING:
    from graphllm.models.checkpoint import Checkpoint

FAMILIES = (LLAMA,)


def find_family(checkpoint: Checkpoint) -> Family:
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


def read_model_config(checkpoint: Checkpoint, family: Family) -> ModelConfig:
    """The checkpoint's mathematics. Raises CheckpointError for any key that is not understood."""
    reader = HFConfig(checkpoint.hf_config, checkpoint.path)
    config = family.read_config(reader)
    reader.check_understood()
    return config
