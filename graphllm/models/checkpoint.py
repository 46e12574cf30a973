"""What a source of weights offers, and which source a path is.

Owns the `Checkpoint` protocol, `open_model` (folder, GGUF file, or for random weights a configuration
alone) and `resolve_model_path` (what `--model` may say). How a Hub repository is fetched is `hub.py`'s.
Does not know model families: a checkpoint hands out Hugging Face names, Hugging Face config keys and
tensors, and `weights.py` turns them into parameters.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from graphllm.config import DEMO_MODEL, EngineConfig
from graphllm.errors import CheckpointError, ConfigError
from graphllm.models.demo import demo_model_path
from graphllm.models.dummy import DummyCheckpoint
from graphllm.models.gguf import GGUFCheckpoint
from graphllm.models.gguf_file import is_gguf_file
from graphllm.models.hub import HubModel, check_revision, fetch_hub_model, parse_hub_name
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


def resolve_model(config: EngineConfig, *, with_weights: bool = True) -> Path:
    """The path of the configured model, fetched first where it is on the Hub or the demo model.

    with_weights: whether a Hub repository's weights are wanted too. Raises CheckpointError, and ConfigError
    for flags that contradict each other.
    """
    return resolve_model_path(
        config.model,
        revision=config.revision,
        gguf_file=config.gguf_file,
        with_weights=with_weights and config.load_format != "dummy",
        with_code=config.trust_remote_code,
    )


def resolve_model_path(
    name: str,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    with_weights: bool = True,
    with_code: bool = False,
) -> Path:
    """Turn the value of `--model` into a path: 'demo' (fetched when missing), a path, or a Hub repository.

    'demo' always means the demo model; a folder of that name is './demo'. What exists is a path, whatever
    it looks like. revision and gguf_file: `--revision` and `--gguf-file`; the latter also of a folder.
    with_code: also a repository's Python files. Blocks while downloading. Raises CheckpointError, and
    ConfigError for flags that have no meaning here.
    """
    if name == DEMO_MODEL:
        _refuse_hub_flags(name, "the demo model", revision=revision, gguf_file=gguf_file)
        return demo_model_path()
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):
        is_folder = path.is_dir()
        _refuse_hub_flags(
            name, "a path of this machine", revision=revision, gguf_file=None if is_folder else gguf_file
        )
        return path / gguf_file if gguf_file is not None else path
    model = parse_hub_name(name)
    if model is None:
        raise CheckpointError(
            f"{name}: no such file or folder, and not a repository on the Hugging Face Hub, which is written "
            "org/name, org/name@revision or org/name:file.gguf."
        )
    return fetch_hub_model(
        _with_flags(name, model, revision=revision, gguf_file=gguf_file),
        with_weights=with_weights,
        with_code=with_code,
    )


def _refuse_hub_flags(name: str, what: str, *, revision: str | None, gguf_file: str | None) -> None:
    for flag, value in (("--revision", revision), ("--gguf-file", gguf_file)):
        if value is not None:
            raise ConfigError(f"{flag} {value} has no meaning with --model {name}, which is {what}.")


def _with_flags(name: str, model: HubModel, *, revision: str | None, gguf_file: str | None) -> HubModel:
    for flag, value, named in (
        ("--revision", revision, model.revision),
        ("--gguf-file", gguf_file, model.gguf_file),
    ):
        if None not in (value, named) and value != named:
            raise ConfigError(f"{flag} {value} contradicts --model {name}.")
    if revision is not None:
        check_revision(revision)
    return replace(model, revision=revision or model.revision, gguf_file=gguf_file or model.gguf_file)
