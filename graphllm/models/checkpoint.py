"""What a source of weights offers, and which source a path is.

Owns the `Checkpoint` protocol, `open_model` (folder, GGUF file, or for random weights a configuration
alone) and `resolve_model_path` (what `--model` may say). Does not know model families: a checkpoint
hands out Hugging Face names, Hugging Face config keys and tensors, and `weights.py` turns them into
parameters.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import torch

from graphllm.config import DEMO_MODEL
from graphllm.errors import CheckpointError
from graphllm.models.demo import demo_model_path
from graphllm.models.dummy import DummyCheckpoint
from graphllm.models.gguf import GGUFCheckpoint
from graphllm.models.gguf_file import is_gguf_file
from graphllm.models.safetensors_folder import FolderCheckpoint
from graphllm.tokenizer.tokenizer import Tokenizer


class Checkpoint(Protocol):
    """One model's configuration, tensors and tokenizer, read from disk a tensor at a time.

    All methods raise CheckpointError, naming the file, when the files are not what they claim.
    """

    path: Path
    hf_config: dict[str, Any]
    """The content of Hugging Face's config.json; a GGUF file's equivalent, with "architectures"."""
    generation_config: dict[str, Any]
    """The content of generation_config.json, or {}."""

    def tensor_names(self) -> Collection[str]:
        """Hugging Face names, for example "model.layers.0.self_attn.q_proj.weight"."""
        ...

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor without reading its data."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU; read-only by agreement, for it may be a view of the mapped file.

        dtype: the checkpoint's own; float32 from a GGUF file, with the q/k permutation undone.
        """
        ...

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that comes with the weights."""
        ...


def open_model(path: Path, load_format: str) -> Checkpoint | DummyCheckpoint:
    """Open what `--load-format` asks for. Raises CheckpointError, naming the file."""
    return DummyCheckpoint(path) if load_format == "dummy" else open_checkpoint(path)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder in Hugging Face layout or a GGUF file; nothing is loaded but headers.

    Raises CheckpointError, naming the file and what is wrong with it.
    """
    if os.path.isdir(path):
        return FolderCheckpoint(path)
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: no such file or folder.")
    if path.suffix.lower() == ".gguf" or is_gguf_file(path):
        return GGUFCheckpoint(path)
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path}: a weights file alone is not enough; give the folder that holds it "
            "together with config.json and tokenizer.json."
        )
    if path.suffix == ".json":
        raise CheckpointError(
            f"{path}: a configuration alone has no weights; --load-format dummy draws random ones."
        )
    raise CheckpointError(f"{path}: neither a folder in Hugging Face layout nor a GGUF file.")


def resolve_model_path(name: str) -> Path:
    """Turn the value of `--model` into a path: 'demo' (fetched when missing) or a local path.

    'demo' always means the demo model; a folder of that name is './demo'. Raises CheckpointError.
    """
    if name == DEMO_MODEL:
        return demo_model_path()
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):
        return path
    parts = name.split("/")
    is_a_file_name = path.suffix in (".gguf", ".json")
    if len(parts) == 2 and all(parts) and not name.startswith((".", "~")) and not is_a_file_name:
        raise CheckpointError(
            f"{name}: no such file or folder. If a repository on the Hugging Face Hub is meant: "
            "downloads are not supported yet; fetch it yourself and give the local folder."
        )
    raise CheckpointError(f"{name}: no such file or folder.")
