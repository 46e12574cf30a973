"""GGUF's number formats, block by block, against scalar decoders written from their definitions."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from graphllm.models.gguf_file import SUPPORTED_TYPES, GGUFFile
from tests.models import gguf_codebooks
from tests.models.small_gguf import raw_gguf, tensor_entry

# The layouts are those of ggml's block structures; each decoder takes one block, one element at a time.


def half(block: bytes, offset: int) -> float:
    value: float = struct.unpack_from("<e", block, offset)[0]
    return value


def decode_f32(block: bytes) -> list[float]:
    return [struct.unpack("<f", block)[0]]


def decode_f16(block: bytes) -> list[float]:
    return [half(block, 0)]


def decode_bf16(block: bytes) -> list[float]:
    return [struct.unpack("<f", b"\0\0" + block)[0]]


def nibble(data: bytes, index: int) -> int:
    """Element `index` of 32: the low nibbles of 16 bytes first, then the high ones."""
    return data[index] & 15 if index < 16 else data[index - 16] >> 4


def fifth_bit(data: bytes, index: int) -> int:
    return (int.from_bytes(data, "little") >> index & 1) << 4


def decode_q4_0(block: bytes) -> list[float]:
    return [half(block, 0) * (nibble(block[2:], i) - 8) for i in range(32)]


def decode_q4_1(block: bytes) -> list[float]:
    return [half(block, 0) * nibble(block[4:], i) + half(block, 2) for i in range(32)]


def decode_q5_0(block: bytes) -> list[float]:
    return [half(block, 0) * ((nibble(block[6:], i) | fifth_bit(block[2:6], i)) - 16) for i in range(32)]


def decode_q5_1(block: bytes) -> list[float]:
    return [
        half(block, 0) * (nibble(block[8:], i) | fifth_bit(block[4:8], i)) + half(block, 2) for i in range(32)
    ]


def decode_q8_0(block: bytes) -> list[float]:
    return [half(block, 0) * q for q in struct.unpack("<32b", block[2:])]


def decode_q2_k(block: bytes) -> list[float]:
    scales, quants, scale, minimum = block[:16], block[16:80], half(block, 80), half(block, 82)
    values = []
    for i in range(256):
        # Two runs of 32 bytes, each holding four groups of 32 in its four bit pairs.
        run, group, lane = i // 128, i % 128 // 32, i % 32
        q = quants[32 * run + lane] >> 2 * group & 3
        packed = scales[i // 16]
        values.append(scale * (packed & 15) * q - minimum * (packed >> 4))
    return values


def decode_q3_k(block: bytes) -> list[float]:
    high_mask, quants, packed, scale = block[:32], block[32:96], block[96:108], half(block, 108)
    values = []
    for i in range(256):
        run, group, lane = i // 128, i % 128 // 32, i % 32
        q = quants[32 * run + lane] >> 2 * group & 3
        if not high_mask[lane] >> i // 32 & 1:
            q -= 4
        j = i // 16
        low = packed[j % 8] >> 4 * (j // 8) & 15
        high = packed[8 + j % 4] >> 2 * (j // 4) & 3
        values.append(scale * ((low | high << 4) - 32) * q)
    return values


def k_scale_and_minimum(packed: bytes, j: int) -> tuple[int, int]:
    """The 6-bit scale and minimum of sub-block j (of 8) out of 12 bytes."""
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    scale = packed[j + 4] & 15 | packed[j - 4] >> 6 << 4
    return scale, packed[j + 4] >> 4 | packed[j] >> 6 << 4


def decode_q4_k(block: bytes) -> list[float]:
    values = []
    for i in range(256):
        scale, minimum = k_scale_and_minimum(block[4:16], i // 32)
        q = block[16 + 32 * (i // 64) + i % 32] >> 4 * (i // 32 % 2) & 15
        values.append(half(block, 0) * scale * q - half(block, 2) * minimum)
    return values


def decode_q5_k(block: bytes) -> list[float]:
    values = []
    for i in range(256):
        scale, minimum = k_scale_and_minimum(block[4:16], i // 32)
        q = block[48 + 32 * (i // 64) + i % 32] >> 4 * (i // 32 % 2) & 15
        q |= (block[16 + i % 32] >> i // 32 & 1) << 4
        values.append(half(block, 0) * scale * q - half(block, 2) * minimum)
    return values


def decode_q6_k(block: bytes) -> list[float]:
    scales = struct.unpack("<16b", block[192:208])
    values = []
    for i in range(256):
        run, group, lane = i // 128, i % 128 // 32, i % 32
        low = block[64 * run + 32 * (group % 2) + lane] >> 4 * (group // 2) & 15
        high = block[128 + 32 * run + lane] >> 2 * group & 3
        values.append(half(block, 208) * scales[i // 16] * ((low | high << 4) - 32))
    return values


DECODERS = {
    GGMLQuantizationType.F32: decode_f32,
    GGMLQuantizationType.F16: decode_f16,
    GGMLQuantizationType.BF16: decode_bf16,
    GGMLQuantizationType.Q4_0: decode_q4_0,
    GGMLQuantizationType.Q4_1: decode_q4_1,
    GGMLQuantizationType.Q5_0: decode_q5_0,
    GGMLQuantizationType.Q5_1: decode_q5_1,
    GGMLQuantizationType.Q8_0: decode_q8_0,
    GGMLQuantizationType.Q2_K: decode_q2_k,
    GGMLQuantizationType.Q3_K: decode_q3_k,
    GGMLQuantizationType.Q4_K: decode_q4_k,
    GGMLQuantizationType.Q5_K: decode_q5_k,
    GGMLQuantizationType.Q6_K: decode_q6_k,
    **gguf_codebooks.DECODERS,
}
# Where a block keeps numbers of its own: random bytes there would be NaN or immense.
HALVES = {
    GGMLQuantizationType.F16: (0,),
    GGMLQuantizationType.Q4_0: (0,),
    GGMLQuantizationType.Q4_1: (0, 2),
    GGMLQuantizationType.Q5_0: (0,),
    GGMLQuantizationType.Q5_1: (0, 2),
    GGMLQuantizationType.Q8_0: (0,),
    GGMLQuantizationType.Q2_K: (80, 82),
    GGMLQuantizationType.Q3_K: (108,),
    GGMLQuantizationType.Q4_K: (0, 2),
    GGMLQuantizationType.Q5_K: (0, 2),
    GGMLQuantizationType.Q6_K: (208,),
}


def random_block(tensor_type: GGMLQuantizationType, source: random.Random) -> bytes:
    if tensor_type is GGMLQuantizationType.F32:
        return struct.pack("<f", source.gauss(0, 1))
    if tensor_type in gguf_codebooks.DECODERS:
        return gguf_codebooks.random_block(tensor_type, source)
    if tensor_type is GGMLQuantizationType.BF16:
        return struct.pack("<f", source.gauss(0, 1))[2:]
    block = bytearray(source.randbytes(gguf.GGML_QUANT_SIZES[tensor_type][1]))
    for offset in HALVES[tensor_type]:
        struct.pack_into("<e", block, offset, source.gauss(0, 1))
    return bytes(block)


@pytest.mark.parametrize("tensor_type", sorted(SUPPORTED_TYPES), ids=lambda tensor_type: tensor_type.name)
def test_dequantized_values_are_those_of_the_format_s_definition(
    tmp_path: Path, tensor_type: GGMLQuantizationType
) -> None:
    source = random.Random(int(tensor_type))
    num_rows, blocks_per_row = 6, 3
    blocks = [random_block(tensor_type, source) for _ in range(num_rows * blocks_per_row)]
    shape = (num_rows, blocks_per_row * gguf.GGML_QUANT_SIZES[tensor_type][0])
    path = tmp_path / "m.gguf"
    path.write_bytes(raw_gguf(tensors=[tensor_entry("x", shape, tensor_type)], data=b"".join(blocks)))
    values = GGUFFile(path).read_float32("x")
    assert values.dtype == np.float32
    assert values.shape == shape
    expected = np.array([DECODERS[tensor_type](block) for block in blocks]).reshape(shape)
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-5)


def test_every_type_that_the_package_dequantizes_is_supported() -> None:
    dequantizable = set()
    for tensor_type, (num_elements, num_bytes) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(np.zeros((1, num_bytes), dtype=np.uint8), tensor_type)
        except NotImplementedError:
            continue
        if num_elements > 1 or tensor_type in (0, 1, 30):  # plain numbers: F32, F16 and BF16
            dequantizable.add(tensor_type)
    assert dequantizable == SUPPORTED_TYPES


@pytest.mark.parametrize("tensor_type", [GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0])
def test_one_entry_of_a_stack_is_read_alone(tmp_path: Path, tensor_type: GGMLQuantizationType) -> None:
    weights = np.random.default_rng(0).standard_normal((3, 5, 64), dtype=np.float32)
    quantized = gguf.quantize(weights, tensor_type)
    path = tmp_path / "m.gguf"
    entry = tensor_entry("x", weights.shape, tensor_type)
    path.write_bytes(raw_gguf(tensors=[entry], data=quantized.tobytes()))
    file = GGUFFile(path)
    for index in range(3):
        np.testing.assert_array_equal(file.read_float32("x", index), file.read_float32("x")[index])
    assert not np.array_equal(file.read_float32("x", 0), file.read_float32("x", 2))


def test_tensor_of_many_chunks_is_dequantized_whole(tmp_path: Path) -> None:
    # More elements than are dequantized at a time, and not a multiple of that.
    source = np.random.default_rng(0)
    weights = source.standard_normal((4101, 64), dtype=np.float32)
    quantized = gguf.quantize(weights, GGMLQuantizationType.Q8_0)
    path = tmp_path / "m.gguf"
    entry = tensor_entry("x", weights.shape, GGMLQuantizationType.Q8_0)
    path.write_bytes(raw_gguf(tensors=[entry], data=quantized.tobytes()))
    values = GGUFFile(path).read_float32("x")
    np.testing.assert_array_equal(values, gguf.dequantize(quantized, GGMLQuantizationType.Q8_0))
    np.testing.assert_allclose(values, weights, atol=0.03)
