"""GGUF's block formats as codes, scales and zeros, for weights that stay packed.

    weight = scale * (code - zero)      Q4_0, Q6_K, Q8_0
    weight = scale * code + offset      Q4_1, Q4_K

Owns which types can stay packed and what is in their blocks. Exact: the same float32 products and sums as in
the `gguf` package's dequantizers, so that packed and expanded weights are the same numbers. How codes lie in
memory is `kernels/packed_weight.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType

from graphllm.kernels.packed_weight import PackedFormat

_Bytes = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]

# Rows are unpacked some at a time, for what is needed on the way.
_SLICE_BYTES = 1 << 20
_HALF_ONE = np.frombuffer(np.float16(1).tobytes(), np.uint8)
# Eight scales of 1 and eight minima of 0, six bits each, as Q4_K packs them into twelve bytes.
_Q4_K_ONES = np.array([1] * 4 + [0] * 4 + [1] * 4, np.uint8)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows of a matrix in a `PackedFormat`.

    codes: [rows, columns], integers in the range of the format's codes. scales: [rows, groups] of its
    scale_dtype. offsets: the same for formats with offsets, else None.
    """

    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.floating]
    offsets: npt.NDArray[np.floating] | None


@dataclass(frozen=True, slots=True)
class _Type:
    format: PackedFormat
    unpack: Callable[[_Bytes], PackedRows]


def packed_format(type: GGMLQuantizationType) -> PackedFormat | None:
    """The form that a tensor of this type can stay in; None for types that have to be expanded."""
    found = _TYPES.get(type)
    return None if found is None else found.format


def unpack_rows(data: _Bytes, type: GGMLQuantizationType) -> PackedRows:
    """What rows of blocks hold: data [rows, bytes of a row] of a type that has a `packed_format`."""
    num_rows, num_bytes = data.shape
    bytes_per_block = gguf.GGML_QUANT_SIZES[type][1]
    assert num_bytes % bytes_per_block == 0, "rows are whole blocks"
    rows_at_once = max(1, _SLICE_BYTES // num_bytes)
    slices = [
        _TYPES[type].unpack(data[first : first + rows_at_once].reshape(-1, bytes_per_block))
        for first in range(0, num_rows, rows_at_once)
    ]
    offsets = [part.offsets for part in slices if part.offsets is not None]
    return PackedRows(
        np.concatenate([part.codes for part in slices]).reshape(num_rows, -1),
        np.concatenate([part.scales for part in slices]).reshape(num_rows, -1),
        np.concatenate(offsets).reshape(num_rows, -1) if offsets else None,
    )


def _halves(blocks: _Bytes, first: int) -> npt.NDArray[np.float16]:
    """The float16 at byte `first` of each block: [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, first : first + 2]).view(np.float16)


def _integers(blocks: _Bytes, type: GGMLQuantizationType, **fields: tuple[int, _Bytes]) -> _Floats:
    """What the package makes of the blocks with some bytes replaced, each by (first byte, bytes).

    With scales of one and no offsets that is the codes, whatever order the blocks keep them in.
    """
    plain = blocks.copy()
    for first, replacement in fields.values():
        plain[:, first : first + len(replacement)] = replacement
    values: _Floats = gguf.dequantize(plain.reshape(1, -1), type)  # row by row it would be slow
    return values.reshape(len(blocks), -1)


def _q8_0(blocks: _Bytes) -> PackedRows:
    codes = np.ascontiguousarray(blocks[:, 2:]).view(np.int8)
    return PackedRows(codes, _halves(blocks, 0), None)


def _q4_0(blocks: _Bytes) -> PackedRows:
    centered = _integers(blocks, GGMLQuantizationType.Q4_0, scale=(0, _HALF_ONE))
    return PackedRows((centered + 8).astype(np.int8), _halves(blocks, 0), None)


def _q4_1(blocks: _Bytes) -> PackedRows:
    zero = np.zeros(2, np.uint8)
    codes = _integers(blocks, GGMLQuantizationType.Q4_1, scale=(0, _HALF_ONE), offset=(2, zero))
    return PackedRows(codes.astype(np.int8), _halves(blocks, 0), _halves(blocks, 2))


def _q4_k(blocks: _Bytes) -> PackedRows:
    q4_k, zero, no_codes = GGMLQuantizationType.Q4_K, np.zeros(2, np.uint8), np.zeros(128, np.uint8)
    codes = _integers(blocks, q4_k, scale=(0, _HALF_ONE), offset=(2, zero), scales=(4, _Q4_K_ONES))
    # Codes of nothing but ones leave the scales, and of nothing but zeros the offsets: one of each 32.
    scales = _integers(blocks, q4_k, offset=(2, zero), codes=(16, no_codes + 0x11))[:, ::32]
    offsets = _integers(blocks, q4_k, codes=(16, no_codes))[:, ::32]
    return PackedRows(codes.astype(np.int8), scales, offsets)


def _q6_k(blocks: _Bytes) -> PackedRows:
    ones = np.ones(16, np.uint8)
    codes = _integers(blocks, GGMLQuantizationType.Q6_K, scales=(192, ones), scale=(208, _HALF_ONE))
    small_scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    scales = _halves(blocks, 208).astype(np.float32) * small_scales.astype(np.float32)
    return PackedRows(codes.astype(np.int8), scales, None)


_TYPES: Mapping[GGMLQuantizationType, _Type] = {
    GGMLQuantizationType.Q8_0: _Type(PackedFormat(bits=8, group_size=32), _q8_0),
    GGMLQuantizationType.Q4_0: _Type(PackedFormat(bits=4, group_size=32), _q4_0),
    GGMLQuantizationType.Q4_1: _Type(PackedFormat(bits=4, group_size=32, zeros="offset"), _q4_1),
    GGMLQuantizationType.Q4_K: _Type(
        PackedFormat(bits=4, group_size=32, zeros="offset", scale_dtype=torch.float32), _q4_k
    ),
    GGMLQuantizationType.Q6_K: _Type(PackedFormat(bits=8, group_size=16, scale_dtype=torch.float32), _q6_k),
}
