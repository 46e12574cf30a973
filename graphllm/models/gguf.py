"""A GGUF file as a checkpoint: Hugging Face names, config and tensors out of one .gguf file.

Owns the translation as a whole. The container is `gguf_file.py`, the naming tables are
`gguf_architectures.py`, the synthesized config is `gguf_config.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from graphllm.errors import CheckpointError
from graphllm.models.gguf_architectures import ARCHITECTURES, GGUFArchitecture
from graphllm.models.gguf_config import read_generation_config, read_hf_config
from graphllm.models.gguf_file import GGUFFile
from graphllm.tokenizer.tokenizer import Tokenizer


class GGUFCheckpoint:
    """Implements `Checkpoint` over one memory-mapped GGUF file.

    Tensors are dequantized to float32 when asked for, one at a time, and nothing is kept.
    Raises CheckpointError, naming the file and the key or tensor, for whatever is malformed, not
    supported or not understood.
    """

    path: Path
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GGUFFile(path)
        architecture = _architecture(self._file)
        self.hf_config = read_hf_config(self._file, architecture)
        self.generation_config = read_generation_config(self._file, self.hf_config["vocab_size"])
        self._gguf_names = _translate_names(self._file, architecture)
        num_heads = {
            "attention.head_count": self.hf_config["num_attention_heads"],
            "attention.head_count_kv": self.hf_config["num_key_value_heads"],
        }
        self._permuted_heads = {
            name: num_heads[key]
            for name, gguf_name in self._gguf_names.items()
            if (key := architecture.head_count_key(gguf_name)) is not None
        }

    def tensor_names(self) -> Collection[str]:
        """Hugging Face names of all parameters, in file order."""
        return self._gguf_names.keys()

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """Shape, row-major, without touching the data."""
        return self._file.tensors[self._gguf_name(name)].shape

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as float32 on the CPU, its rows in Hugging Face's order."""
        gguf_name = self._gguf_name(name)
        values = torch.from_numpy(self._file.read_float32(gguf_name))  # [rows, ...] float32
        num_heads = self._permuted_heads.get(name)
        if num_heads is None:
            return values
        if values.shape[0] % (2 * num_heads):
            raise CheckpointError(
                f"{self.path}: tensor {gguf_name!r} has {values.shape[0]} rows, "
                f"which {num_heads} heads cannot share in pairs."
            )
        return _undo_rotary_permutation(values, num_heads)

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer in the file's metadata."""
        if "tokenizer.ggml.model" not in self._file.fields:
            raise CheckpointError(
                f"{self.path}: metadata key 'tokenizer.ggml.model' is missing; the file has no tokenizer."
            )
        fields = {
            key: value
            for key, value in self._file.fields.items()
            if key.startswith(("tokenizer.", "general."))
        }
        try:
            return Tokenizer.from_gguf(fields)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error.message}") from error

    def _gguf_name(self, name: str) -> str:
        try:
            return self._gguf_names[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: it has no tensor for {name!r}.") from None


def _architecture(file: GGUFFile) -> GGUFArchitecture:
    if file.fields.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{file.path}: one part of a GGUF model that was split (metadata key 'split.count' is "
            f"{file.fields['split.count']}); merge the parts into one file first."
        )
    name = file.fields.get("general.architecture")
    if name is None:
        raise CheckpointError(f"{file.path}: metadata key 'general.architecture' is missing.")
    architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if architecture is None:
        raise CheckpointError(
            f"{file.path}: metadata key 'general.architecture' is {name!r}, which is not supported; "
            f"{', '.join(sorted(ARCHITECTURES))} is."
        )
    return architecture


def _translate_names(file: GGUFFile, architecture: GGUFArchitecture) -> dict[str, str]:
    """Hugging Face name to GGUF name. Raises CheckpointError for a tensor that has none."""
    names = {}
    for gguf_name in file.tensors:
        if gguf_name in architecture.consumed_tensors:
            continue
        name = architecture.translate(gguf_name)
        if name is None:
            raise CheckpointError(
                f"{file.path}: tensor {gguf_name!r} is not one of architecture "
                f"{file.fields['general.architecture']!r}, as far as it is understood."
            )
        names[name] = gguf_name
    return names


def _undo_rotary_permutation(values: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Give rows [pairs interleaved: 0, n, 1, n+1, ...] of each head the order [0, 1, ..., n, n+1, ...].

    Converters to GGUF interleave the two halves of each head of q and k, because ggml's rotary
    embedding for Llama turns neighbouring elements where Hugging Face's turns the two halves.
    values: [rows, ...], rows a multiple of 2 * num_heads. Returns a new contiguous tensor.
    """
    pairs = values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
