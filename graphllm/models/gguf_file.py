"""The GGUF container: header, metadata, tensor table, and float32 out of its number formats.

Owns the bytes. Does not know architectures or Hugging Face names: `gguf.py` and its tables do.
Value types, block sizes and the dequantizers are the `gguf` package's. The header is read here,
because the package's reader makes several numpy arrays for each token of the vocabulary (seconds
at start-up) and takes lengths on trust, where a damaged file must be refused by name.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

from graphllm.errors import CheckpointError

SUPPORTED_TYPES = frozenset(
    GGMLQuantizationType[name]
    for name in (
        *("F32", "F16", "BF16"),
        *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
        *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
    )
)
"""Tensor types whose dequantizers are tested here."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_SCALAR_FORMATS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
# Few enough elements that the intermediates stay in the cache, enough that the package's cost for
# each call does not show: 135M parameters take 0.5 s this way and 2.5 s row by row.
_DEQUANTIZE_ELEMENTS = 65536


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One entry of the tensor table."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    """Row-major, as torch counts: the reverse of the file's order."""
    offset: int
    """First byte, from the start of the file."""
    num_bytes: int


def is_gguf_file(path: Path) -> bool:
    """Whether a regular file starts with the GGUF magic."""
    try:
        with path.open("rb") as file:
            return path.is_file() and file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


class GGUFFile:
    """An open, memory-mapped GGUF file whose header has been read and checked.

    fields: metadata as plain Python values (int, float, bool, str, or a list of one of them).
    tensors: the tensor table, by GGUF name, in file order.
    Raises CheckpointError, naming the file and the key or tensor, for anything malformed.
    """

    path: Path
    fields: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = _map_file(path)
        header = _Header(path, self._map)
        num_tensors, num_fields = header.counts()
        self.fields = header.fields(num_fields)
        self.tensors = header.tensors(num_tensors, alignment=self._alignment())

    def _alignment(self) -> int:
        alignment = self.fields.get("general.alignment", _DEFAULT_ALIGNMENT)
        # A power of two that keeps float64 aligned.
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise CheckpointError(
                f"{self.path}: general.alignment is {alignment!r}; it must be a power of two, at least 8."
            )
        return alignment

    def read_float32(self, name: str, index: int | None = None) -> npt.NDArray[np.float32]:
        """The tensor's values, [*shape] float32; F32 tensors are views of the mapped file.

        index: only this entry of the first of several dimensions, [*shape[1:]]; the others are not touched.
        """
        tensor = self.tensors[name]
        raw, shape = self._read(name, index)
        if tensor.type is GGMLQuantizationType.F32:
            return raw.view(np.float32).reshape(shape)
        elements_per_block, bytes_per_block = gguf.GGML_QUANT_SIZES[tensor.type]
        blocks = raw.reshape(-1, bytes_per_block)
        values = np.empty((blocks.shape[0], elements_per_block), dtype=np.float32)
        step = max(1, _DEQUANTIZE_ELEMENTS // elements_per_block)
        with np.errstate(all="ignore"):  # weights that are not finite are not for numpy to warn of
            for start in range(0, blocks.shape[0], step):
                row = blocks[start : start + step].reshape(1, -1)
                chunk = gguf.dequantize(row, tensor.type)
                values[start : start + step] = chunk.reshape(-1, elements_per_block)
        return values.reshape(shape)

    def read_blocks(self, name: str, index: int | None = None) -> npt.NDArray[np.uint8]:
        """The rows of a matrix as they are stored, [rows, bytes of a row]; index: as in `read_float32`."""
        raw, shape = self._read(name, index)
        return raw.reshape(shape[0], -1)

    def _read(self, name: str, index: int | None) -> tuple[npt.NDArray[np.uint8], tuple[int, ...]]:
        """The bytes of a tensor or of one entry, and its shape."""
        tensor = self.tensors[name]
        shape, num_bytes, offset = tensor.shape, tensor.num_bytes, tensor.offset
        if index is not None:  # rows are whole blocks, so entries are whole bytes
            num_bytes //= shape[0]
            shape, offset = shape[1:], offset + index * num_bytes
        return np.frombuffer(self._map, dtype=np.uint8, count=num_bytes, offset=offset), shape


def _map_file(path: Path) -> mmap.mmap:
    """Map the file privately: pages come from the page cache, and a write would never reach the disk.

    A private map rather than a read-only one, because torch has no read-only tensors and warns.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file, or not a regular one.")
        with path.open("rb") as file:
            if not file.read(1):
                raise CheckpointError(f"{path}: the file is empty.")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error


class _Header:
    """A cursor over the header; every read is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._offset = 0

    def counts(self) -> tuple[int, int]:
        """Read magic, version and the number of tensors and of metadata fields."""
        if self._take(4, "its magic number") != _MAGIC:
            self._refuse("not a GGUF file (it does not start with the bytes 'GGUF')")
        version = self._scalar("<I", "its version")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            if swapped in _VERSIONS:
                self._refuse("a big-endian GGUF file, which is not supported")
            self._refuse(f"GGUF version {version} is not supported; versions 2 and 3 are")
        return self._scalar("<Q", "its tensor count"), self._scalar("<Q", "its metadata count")

    def fields(self, count: int) -> dict[str, Any]:
        """Read `count` metadata fields."""
        fields: dict[str, Any] = {}
        for index in range(count):
            key = self._string(f"the name of metadata field {index + 1} of {count}")
            if key in fields:
                self._refuse(f"metadata key {key!r} appears twice")
            fields[key] = self._value(key)
        return fields

    def tensors(self, count: int, *, alignment: int) -> dict[str, GGUFTensor]:
        """Read `count` tensor entries and check that their data lie in the file, apart from each other."""
        tensors: dict[str, GGUFTensor] = {}
        for index in range(count):
            tensor = self._tensor(f"the entry of tensor {index + 1} of {count}")
            if tensor.name in tensors:
                self._refuse(f"tensor {tensor.name!r} appears twice")
            if tensor.offset % alignment:
                self._refuse(f"the data of tensor {tensor.name!r} is not aligned to {alignment} bytes")
            tensors[tensor.name] = tensor
        data_start = -(-self._offset // alignment) * alignment
        end = data_start
        placed = {}
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            start = data_start + tensor.offset
            if start < end:
                self._refuse(f"the data of tensor {tensor.name!r} overlaps another tensor's")
            end = start + tensor.num_bytes
            if end > len(self._data):
                self._refuse(
                    f"the data of tensor {tensor.name!r} ends at byte {end}, beyond the file's end at byte "
                    f"{len(self._data)}; the file is truncated or its header is damaged"
                )
            placed[tensor.name] = GGUFTensor(
                tensor.name, tensor.type, tensor.shape, offset=start, num_bytes=tensor.num_bytes
            )
        return {name: placed[name] for name in tensors}

    def _tensor(self, what: str) -> GGUFTensor:
        """One entry of the tensor table, its offset still counted from the start of the data."""
        name = self._string(what)
        what = f"the entry of tensor {name!r}"
        num_dimensions = self._scalar("<I", what)
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            self._refuse(
                f"tensor {name!r} has {num_dimensions} dimensions; 1 to {_MAX_DIMENSIONS} are possible"
            )
        shape = tuple(self._scalar("<Q", what) for _ in range(num_dimensions))[::-1]
        raw_type = self._scalar("<I", what)
        offset = self._scalar("<Q", what)
        if 0 in shape:
            self._refuse(f"tensor {name!r} is empty: its shape is {list(shape)}")
        try:
            tensor_type = GGMLQuantizationType(raw_type)
        except ValueError:
            self._refuse(f"tensor {name!r} has the unknown type {raw_type}")
        if tensor_type not in SUPPORTED_TYPES:
            supported = ", ".join(sorted(type.name for type in SUPPORTED_TYPES))
            self._refuse(
                f"tensor {name!r} has type {tensor_type.name}, which is not supported; {supported} are"
            )
        elements_per_block, bytes_per_block = gguf.GGML_QUANT_SIZES[tensor_type]
        if shape[-1] % elements_per_block:
            self._refuse(
                f"tensor {name!r} has rows of {shape[-1]} elements, not a multiple of the "
                f"{elements_per_block} in a block of {tensor_type.name}"
            )
        num_bytes = prod(shape) // elements_per_block * bytes_per_block
        return GGUFTensor(name, tensor_type, shape, offset=offset, num_bytes=num_bytes)

    def _value(self, key: str) -> Any:
        what = f"metadata key {key!r}"
        value_type = self._value_type(what)
        if value_type is GGUFValueType.ARRAY:
            return self._array(what)
        if value_type is GGUFValueType.STRING:
            return self._string(what)
        return self._scalar(_SCALAR_FORMATS[value_type], what)

    def _array(self, what: str) -> list[Any]:
        item_type = self._value_type(what)
        count = self._scalar("<Q", what)
        if item_type is GGUFValueType.ARRAY:
            self._refuse(f"{what} is an array of arrays, which is not supported")
        if item_type is GGUFValueType.STRING:
            return self._strings(count, what)
        item = np.dtype(_SCALAR_FORMATS[item_type])
        data = self._take(count * item.itemsize, what)
        values: list[Any] = np.frombuffer(data, dtype=item).tolist()
        return values

    def _strings(self, count: int, what: str) -> list[str]:
        # Vocabularies have up to a quarter of a million entries: one tight loop.
        data, end, offset = self._data, len(self._data), self._offset
        unpack_length = struct.Struct("<Q").unpack_from
        strings: list[str] = []
        try:
            for _ in range(count):
                start = offset + 8
                offset = start + unpack_length(data, offset)[0]
                if offset > end:
                    self._refuse_end(what)
                strings.append(data[start:offset].decode())
        except struct.error:
            self._refuse_end(what)
        except UnicodeDecodeError:
            self._refuse(f"entry {len(strings)} of {what} is not valid UTF-8")
        self._offset = offset
        return strings

    def _value_type(self, what: str) -> GGUFValueType:
        raw_type = self._scalar("<I", what)
        try:
            return GGUFValueType(raw_type)
        except ValueError:
            self._refuse(f"{what} has the unknown value type {raw_type}")

    def _string(self, what: str) -> str:
        data = self._take(self._scalar("<Q", what), what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            self._refuse(f"{what} is not valid UTF-8")

    def _scalar(self, format: str, what: str) -> Any:
        return struct.unpack(format, self._take(struct.calcsize(format), what))[0]

    def _take(self, count: int, what: str) -> bytes:
        start = self._offset
        if count > len(self._data) - start:
            self._refuse_end(what)
        self._offset = start + count
        return self._data[start : start + count]

    def _refuse_end(self, what: str) -> NoReturn:
        self._refuse(f"the file ends inside {what}; it is truncated or its header is damaged")

    def _refuse(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self._path}: {reason}.")
