"""A folder in Hugging Face layout as a checkpoint: config.json, safetensors shards, tokenizer files.

Owns finding the files and refusing those that are missing, damaged or at odds with each other,
before anything is served. Does not interpret the configuration.
Weights format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from graphllm.errors import CheckpointError
from graphllm.models.hf_keys import QUANTIZATION_FILES, QUANTIZATION_KEYS
from graphllm.tokenizer.tokenizer import Tokenizer

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
OTHER_WEIGHTS_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx"})
# Plain numbers, and what packed ones are made of.
_SUPPORTED_DTYPES = frozenset({"F32", "F16", "BF16", "U8", "I8", "I32", "I64", "F8_E4M3", "F8_E8M0"})
_NOT_FILE_NAMES = frozenset({"", ".", ".."})
_NOT_IN_FILE_NAMES = frozenset("/\\\0")
_MAX_JSON_BYTES = 64 << 20
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself


class FolderCheckpoint:
    """Implements `Checkpoint` over memory-mapped safetensors files.

    Reads config.json, generation_config.json when there is one, a quantizer's own file where config.json
    says nothing of packed weights, and the headers of all shards.
    Raises CheckpointError naming the file and what is wrong with it. Shard names come from the
    folder's own index and must be plain file names, so nothing outside the folder is opened unless
    a file of the folder is itself a link, as in a Hub cache.
    """

    path: Path
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            _refuse(path, "is not a folder" if path.exists() else "no such folder")
        try:
            self.hf_config = read_json_object(path / "config.json")
            add_quantization_file(self.hf_config, path)
            generation_config = path / "generation_config.json"
            self.generation_config = (
                read_json_object(generation_config) if os.path.lexists(generation_config) else {}
            )
            self._shard_of_tensor = _open_shards(path)
        except OSError as error:
            _refuse(path, f"cannot be read: {error}", cause=error)

    def tensor_names(self) -> Collection[str]:
        """The names in the shards' headers."""
        return self._shard_of_tensor.keys()

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """Shape, without touching the data."""
        return self._shard(name).shapes[name]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype, on the CPU, a view of the mapped file."""
        shard = self._shard(name)
        try:
            tensor: torch.Tensor = shard.handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            _refuse(shard.path, f"tensor {name!r} cannot be read: {error}", cause=error)
        return tensor

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer in the folder's own files."""
        try:
            return Tokenizer.from_folder(self.path)
        except CheckpointError as error:
            if str(self.path) in error.message:
                raise
            raise CheckpointError(f"{self.path}: {error.message}") from error

    def _shard(self, name: str) -> _Shard:
        try:
            return self._shard_of_tensor[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: it has no tensor {name!r}.") from None


def add_quantization_file(hf_config: dict[str, Any], folder: Path) -> None:
    """Where config.json says nothing of packed weights, add what a quantizer's own file in the folder says,
    under the file's name. Raises CheckpointError for one that cannot be read."""
    if all(hf_config.get(key) is None for key in QUANTIZATION_KEYS):
        for name in QUANTIZATION_FILES:
            if os.path.lexists(folder / name):
                hf_config[name] = read_json_object(folder / name)
                return


@dataclass(frozen=True, slots=True)
class _Shard:
    """One open safetensors file."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    handle: Any


def _open_shards(folder: Path) -> dict[str, _Shard]:
    """Tensor name to the shard that holds it. The single file wins over an index, as in transformers."""
    if os.path.lexists(folder / WEIGHTS_FILE):
        shard = _open_shard(folder / WEIGHTS_FILE)
        return dict.fromkeys(shard.shapes, shard)
    if os.path.lexists(folder / INDEX_FILE):
        return _open_indexed_shards(folder / INDEX_FILE)
    _refuse_missing_weights(folder)


def _open_indexed_shards(index: Path) -> dict[str, _Shard]:
    weight_map = read_weight_map(index)
    shards = {name: _open_shard(index.parent / name) for name in sorted(set(weight_map.values()))}
    for tensor, name in weight_map.items():
        if tensor not in shards[name].shapes:
            _refuse(index, f"tensor {tensor!r} should be in {name}, which does not have it")
    for name, shard in shards.items():
        for tensor in shard.shapes:
            listed = weight_map.get(tensor)
            if listed is None:
                _refuse(shard.path, f"tensor {tensor!r} is not listed in {index.name}")
            if listed != name:
                _refuse(
                    shard.path, f"tensor {tensor!r} is here and in {listed} too; {index.name} lists {listed}"
                )
    return {tensor: shards[name] for tensor, name in weight_map.items()}


def read_weight_map(index: Path) -> dict[str, str]:
    """An index file's map from tensors to plain file names. Raises CheckpointError."""
    weight_map = read_json_object(index, unique_keys=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _refuse(index, "it has no 'weight_map' from tensors to files")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name in _NOT_FILE_NAMES or _NOT_IN_FILE_NAMES.intersection(name):
            _refuse(index, f"tensor {tensor!r} is said to be in {name!r}, which is not a plain file name")
    return weight_map


def _open_shard(path: Path) -> _Shard:
    if not path.is_file():
        _refuse(path, "is not a regular file" if path.exists() else "is missing")
    try:
        shapes = {name: tensor.shape for name, tensor in read_header(path).items()}
        handle = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        _refuse(path, f"cannot be read: {error}", cause=error)
    return _Shard(path, shapes, handle)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a file holds a tensor. dtype: in the format's words; start, end: bytes from the file's begin."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors by name. Finds what the library lets pass (repeated names) or only hints at.

    Raises CheckpointError. That a tensor has as many bytes as its shape needs is the library's to check.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
            _refuse(path, f"truncated or damaged: {size} bytes cannot hold the header that it announces")
        header = _parse_json_object(path, file.read(header_bytes), what="its header", unique_keys=True)
    header.pop("__metadata__", None)
    if not header:
        _refuse(path, "it has no tensors")
    tensors: dict[str, StoredTensor] = {}
    data, end = 8 + header_bytes, 0
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(stop)]} if all(
                isinstance(length, int) for length in shape
            ):
                end = max(end, stop)
                tensors[name] = StoredTensor(dtype, tuple(shape), data + start, data + stop)
            case _:
                _refuse(path, f"its header is damaged at tensor {name!r}")
        if dtype not in _SUPPORTED_DTYPES:
            supported = ", ".join(sorted(_SUPPORTED_DTYPES))
            _refuse(path, f"tensor {name!r} has dtype {dtype}, which is not supported; {supported} are")
    data_bytes = size - data
    if data_bytes < end:
        _refuse(path, f"truncated: its header announces {end} bytes of data, but {data_bytes} are there")
    return tensors


def read_json_object(path: Path, *, unique_keys: bool = False) -> dict[str, Any]:
    if not path.is_file():
        _refuse(path, "is not a regular file" if path.exists() else "is missing")
    with path.open("rb") as file:
        data = file.read(_MAX_JSON_BYTES + 1)
    if len(data) > _MAX_JSON_BYTES:
        _refuse(path, f"it is larger than {_MAX_JSON_BYTES} bytes")
    return _parse_json_object(path, data, what="it", unique_keys=unique_keys)


def _parse_json_object(path: Path, data: bytes, *, what: str, unique_keys: bool) -> dict[str, Any]:
    """Raises CheckpointError for anything but a JSON object, or for a repeated key where that matters."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                _refuse(path, f"{what} names {key!r} twice")
            result[key] = value
        return result

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique if unique_keys else None)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"{what} is not valid JSON: {error}", cause=error)
    if not isinstance(value, dict):
        _refuse(path, f"{what} is not a JSON object")
    return value


def _refuse_missing_weights(folder: Path) -> NoReturn:
    """Say what stands in for the weights, when something does."""
    names = sorted(entry.name for entry in folder.iterdir())
    if parts := [name for name in names if name.endswith(".safetensors")]:
        _refuse(folder, f"it has {parts[0]}, but neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        _refuse(folder, f"it has no {WEIGHTS_FILE}; to serve {ggufs[0]}, give the path of that file")
    if others := [name for name in names if Path(name).suffix in OTHER_WEIGHTS_SUFFIXES]:
        _refuse(folder, f"it has weights only as {others[0]}; convert them to safetensors ({WEIGHTS_FILE})")
    _refuse(folder, f"it has no weights: neither {WEIGHTS_FILE} nor {INDEX_FILE}")


def _refuse(path: Path, reason: str, *, cause: BaseException | None = None) -> NoReturn:
    raise CheckpointError(f"{path}: {reason}.") from cause
