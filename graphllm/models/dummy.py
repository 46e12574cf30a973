"""Random weights of a real shape, for measuring speed where no checkpoint can be had.

Owns what `--load-format dummy` means: where the configuration and the tokenizer come from, and how the
parameters are drawn. Their values mean nothing, but they keep activations finite in 16 bits and logits
in the range that trained models have.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphllm.errors import CheckpointError
from graphllm.layers.linear import Linear
from graphllm.layers.moe import ExpertStack
from graphllm.layers.norm import Norm
from graphllm.models.gguf import GGUFCheckpoint
from graphllm.models.gguf_file import is_gguf_file
from graphllm.models.registry import find_family, read_model_config
from graphllm.models.safetensors_folder import add_quantization_file
from graphllm.tokenizer.byte_level import byte_level_tokenizer
from graphllm.tokenizer.tokenizer import Tokenizer

STANDARD_DEVIATION = 0.02
"""What transformers initializes the weights of most decoders with (`initializer_range`)."""


class DummyCheckpoint:
    """A model's configuration and tokenizer, without its weights.

    path: a folder with config.json, a file with its content by any name, or a GGUF file, of which only
    the header is read. Raises CheckpointError, naming the file.
    """

    path: Path
    hf_config: dict[str, Any]
    gguf: GGUFCheckpoint | None
    """The file whose header it is of, where it is a GGUF file's."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.gguf = None
        if not os.path.exists(path):
            raise CheckpointError(f"{path}: no such file or folder.")
        if path.is_dir():
            self.hf_config = _read_config(path / "config.json")
            add_quantization_file(self.hf_config, path)
        elif path.suffix.lower() == ".gguf" or is_gguf_file(path):
            self.gguf = GGUFCheckpoint(path)
            self.hf_config = self.gguf.hf_config
        else:
            self.hf_config = _read_config(path)

    def load_tokenizer(self) -> Tokenizer:
        """The model's own tokenizer where it comes with one, else a byte-level one of the same size."""
        if self.gguf is not None:
            return self.gguf.load_tokenizer()
        if (self.path / "tokenizer.json").is_file():
            return Tokenizer.from_folder(self.path)
        vocab_size = self.hf_config.get("vocab_size")
        if "text_config" in self.hf_config:  # of which a file may say next to nothing
            vocab_size = read_model_config(self, find_family(self)).vocab_size
        if not isinstance(vocab_size, int):
            raise CheckpointError(f"{self.path}: configuration key 'vocab_size' is {vocab_size!r}.")
        try:
            return byte_level_tokenizer(vocab_size)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error.message}") from error


def fill_random(model: nn.Module, *, seed: int) -> None:
    """Draw every parameter of `model` where it lies, so nothing passes through the host.

    Weights and biases are normal with STANDARD_DEVIATION around 0; norms multiply by 1. The same
    seed gives the same values on the same kind of device.
    """
    generators: dict[torch.device, torch.Generator] = {}
    seen: set[int] = set()  # a tied head has the embedding's weight
    for module in model.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in seen]
        if not own:
            continue
        seen.update(map(id, own))
        device = own[0].device
        generator = generators.setdefault(device, torch.Generator(device).manual_seed(seed))
        if isinstance(module, Linear | ExpertStack):
            module.scheme.fill_random(module, generator=generator, deviation=STANDARD_DEVIATION)
            module.scheme.finish(module)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if name == "weight" and isinstance(module, Norm):
                parameter.fill_(module.neutral_weight)
            else:
                parameter.normal_(0.0, STANDARD_DEVIATION, generator=generator)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}.")
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a configuration that can be read: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: not a JSON object.")
    return config
