"""A GGUF file as a checkpoint: Hugging Face names, config and tensors out of one .gguf file.

Owns the translation as a whole. The container is `gguf_file.py`, the declarations are
`gguf_families.py`, the synthesized config is `gguf_config.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from graphllm.errors import CheckpointError
from graphllm.kernels.packed_weight import PackedFormat
from graphllm.models.gguf_architectures import GGUFArchitecture, TensorSource, find_tensors
from graphllm.models.gguf_arrangements import (
    key_halves,
    key_rows,
    query_halves,
    query_rows,
    value_rows,
)
from graphllm.models.gguf_config import read_generation_config, read_hf_config
from graphllm.models.gguf_families import ARCHITECTURES
from graphllm.models.gguf_file import GGUFFile
from graphllm.models.gguf_metadata import GGUFMetadata
from graphllm.models.gguf_packed import PackedRows, packed_format, unpack_rows
from graphllm.tokenizer.tokenizer import Tokenizer

# Arrangements that pick and order whole rows, and change nothing in them.
_ROW_ORDERS = (None, query_halves, key_halves, query_rows, key_rows, value_rows)


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
        metadata, architecture = _architecture(self._file)
        self.hf_config, heads = read_hf_config(metadata, architecture)
        self.generation_config = read_generation_config(self._file, self.hf_config["vocab_size"])
        num_layers = self.hf_config[architecture.renames.get("num_hidden_layers", "num_hidden_layers")]
        self._sources = find_tensors(self._file, architecture, heads=heads, num_layers=num_layers)

    def tensor_names(self) -> Collection[str]:
        """Hugging Face names of all parameters, in file order."""
        return self._sources.keys()

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """Shape, row-major, without touching the data."""
        shapes = [self._file.tensors[stored].shape for stored in self._source(name).stored]
        is_entry = self._source(name).index is not None
        parts = [torch.empty(shape[1:] if is_entry else shape, device="meta") for shape in shapes]
        return tuple(self._arrange(name, parts).shape)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as float32 on the CPU, arranged as Hugging Face has it."""
        source = self._source(name)
        parts = [torch.from_numpy(self._file.read_float32(stored, source.index)) for stored in source.stored]
        return self._arrange(name, parts).contiguous()

    def packed_form(self, name: str) -> tuple[str, PackedFormat] | None:
        """The type's name and the form that a matrix can stay in; None where it has to be expanded."""
        source = self._source(name)
        if len(source.stored) != 1 or source.arrange not in _ROW_ORDERS:
            return None
        stored = self._file.tensors[source.stored[0]]
        form = packed_format(stored.type)
        is_matrix = len(stored.shape) - (source.index is not None) == 2
        return (stored.type.name, form) if form is not None and is_matrix else None

    def packed_rows(self, name: str) -> PackedRows:
        """A matrix that has a `packed_form`, its rows arranged as Hugging Face has them."""
        source = self._source(name)
        stored = source.stored[0]
        rows = unpack_rows(self._file.read_blocks(stored, source.index), self._file.tensors[stored].type)
        if source.arrange is None:
            return rows
        order = self._arrange(name, [torch.arange(len(rows.codes))]).numpy()
        offsets = None if rows.offsets is None else rows.offsets[order]
        return PackedRows(rows.codes[order], rows.scales[order], offsets)

    def _arrange(self, name: str, parts: list[torch.Tensor]) -> torch.Tensor:
        source = self._source(name)
        if source.arrange is None:
            return parts[0]
        try:
            return source.arrange(parts, source.heads)
        except (RuntimeError, IndexError) as error:
            shapes = ", ".join(str(list(part.shape)) for part in parts)
            raise CheckpointError(
                f"{self.path}: tensor {source.stored[0]!r} has shape {shapes}, which does not fit "
                f"{source.heads.num_heads} heads, {source.heads.num_kv_heads} key heads of "
                f"{source.heads.head_dim} dimensions."
            ) from error

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

    def _source(self, name: str) -> TensorSource:
        try:
            return self._sources[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: it has no tensor for {name!r}.") from None


def _architecture(file: GGUFFile) -> tuple[GGUFMetadata, GGUFArchitecture]:
    """The metadata under the architecture's prefix, and the declaration that applies."""
    if file.fields.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{file.path}: one part of a GGUF model that was split (metadata key 'split.count' is "
            f"{file.fields['split.count']}); merge the parts into one file first."
        )
    name = file.fields.get("general.architecture")
    if name is None:
        raise CheckpointError(f"{file.path}: metadata key 'general.architecture' is missing.")
    declarations = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if declarations is None:
        raise CheckpointError(
            f"{file.path}: metadata key 'general.architecture' is {name!r}, which is not supported; "
            f"{', '.join(sorted(ARCHITECTURES))} are."
        )
    metadata = GGUFMetadata(file, name)
    for declaration in declarations[:-1]:
        if declaration.applies is not None and declaration.applies(metadata):
            return metadata, declaration
    return metadata, declarations[-1]
