"""GGUF's codebook, ternary and 4-bit floating-point formats decoded one element at a time.

The layouts are those of ggml's block structures. The codebooks themselves, thousands of numbers, are the
`gguf` package's tables; how a block points into them is written out here.
"""

from __future__ import annotations

import random
import struct
from typing import Any

import gguf
from gguf import GGMLQuantizationType, quants

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def half(block: bytes, offset: int) -> float:
    value: float = struct.unpack_from("<e", block, offset)[0]
    return value


def word(data: bytes, index: int, size: int) -> int:
    """Number `index` of an array of little-endian numbers of so many bytes."""
    return int.from_bytes(data[index * size : (index + 1) * size], "little")


def nibble(data: bytes, index: int) -> int:
    return data[index // 2] >> 4 * (index % 2) & 15


def codebook(kind: Any, entry: int, lane: int) -> float:
    """A number of one of the package's tables; kind: its class of that format."""
    kind.init_grid()
    return float(kind.grid[0, 0, entry, lane])


def even_signs(code: int) -> list[int]:
    """Eight signs of which an even number is negative, out of seven bits."""
    bits = code | (code.bit_count() % 2) << 7
    return [-1 if bits >> lane & 1 else 1 for lane in range(8)]


def e2m1(code: int) -> float:
    return -_E2M1[code & 7] if code & 8 else _E2M1[code & 7]


def decode_tq1_0(block: bytes) -> list[float]:
    """Five ternary digits a byte, as a fraction of 256 rounded up: times 3, the digit is what overflows."""
    scale, values = half(block, 52), []
    for start, length, num_digits in ((0, 32, 5), (32, 16, 5), (48, 4, 4)):
        for digit in range(num_digits):
            for lane in range(length):
                rest = block[start + lane] * 3**digit % 256
                values.append(scale * ((rest * 3 >> 8) - 1))
    return values


def decode_tq2_0(block: bytes) -> list[float]:
    scale, values = half(block, 64), []
    for i in range(256):
        run, group, lane = i // 128, i % 128 // 32, i % 32
        values.append(scale * ((block[32 * run + lane] >> 2 * group & 3) - 1))
    return values


def decode_mxfp4(block: bytes) -> list[float]:
    scale = 2.0 ** (block[0] - 127)
    codes = [byte & 15 for byte in block[1:]] + [byte >> 4 for byte in block[1:]]
    return [scale * e2m1(code) for code in codes]


def decode_nvfp4(block: bytes) -> list[float]:
    """Four groups of 16 with a scale each, 8 bits: 4 of exponent and 3 of mantissa."""
    values = []
    for group in range(4):
        exponent, mantissa = block[group] >> 3, block[group] & 7
        scale = mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        data = block[4 + 8 * group : 12 + 8 * group]
        codes = [byte & 15 for byte in data] + [byte >> 4 for byte in data]
        values += [scale * e2m1(code) for code in codes]
    return values


def decode_iq4_nl(block: bytes) -> list[float]:
    codes = [byte & 15 for byte in block[2:]] + [byte >> 4 for byte in block[2:]]
    return [half(block, 0) * _IQ4_VALUES[code] for code in codes]


def decode_iq4_xs(block: bytes) -> list[float]:
    values = []
    for group in range(8):
        scale = nibble(block[4:8], group) | (word(block[2:4], 0, 2) >> 2 * group & 3) << 4
        data = block[8 + 16 * group : 24 + 16 * group]
        codes = [byte & 15 for byte in data] + [byte >> 4 for byte in data]
        values += [half(block, 0) * (scale - 32) * _IQ4_VALUES[code] for code in codes]
    return values


def decode_iq2_xxs(block: bytes) -> list[float]:
    values = []
    for group in range(8):
        entries, packed = block[2 + 8 * group : 6 + 8 * group], word(block[6 + 8 * group :], 0, 4)
        scale = half(block, 0) * (0.5 + (packed >> 28)) / 4
        for part in range(4):
            signs = even_signs(packed >> 7 * part & 127)
            values += [
                scale * signs[lane] * codebook(quants.IQ2_XXS, entries[part], lane) for lane in range(8)
            ]
    return values


def decode_iq2_xs(block: bytes) -> list[float]:
    values = []
    for part in range(32):
        packed = word(block[2:66], part, 2)
        scale = half(block, 0) * (0.5 + nibble(block[66:], part // 2)) / 4
        signs = even_signs(packed >> 9)
        values += [scale * signs[lane] * codebook(quants.IQ2_XS, packed & 511, lane) for lane in range(8)]
    return values


def decode_iq2_s(block: bytes) -> list[float]:
    entries, signs, high, scales = block[2:34], block[34:66], block[66:74], block[74:82]
    values = []
    for part in range(32):
        entry = entries[part] | (high[part // 4] >> 2 * (part % 4) & 3) << 8
        scale = half(block, 0) * (0.5 + nibble(scales, part // 2)) / 4
        for lane in range(8):
            sign = -1 if signs[part] >> lane & 1 else 1
            values.append(scale * sign * codebook(quants.IQ2_S, entry, lane))
    return values


def decode_iq3_xxs(block: bytes) -> list[float]:
    values = []
    for i in range(256):
        packed = word(block[66:], i // 32, 4)
        sign = even_signs(packed >> 7 * (i % 32 // 8) & 127)[i % 8]
        scale = half(block, 0) * (0.5 + (packed >> 28)) / 2
        values.append(scale * sign * codebook(quants.IQ3_XXS, block[2 + i // 4], i % 4))
    return values


def decode_iq3_s(block: bytes) -> list[float]:
    entries, high, signs, scales = block[2:66], block[66:74], block[74:106], block[106:110]
    values = []
    for i in range(256):
        entry = entries[i // 4] | (high[i // 32] >> i % 32 // 4 & 1) << 8
        sign = -1 if signs[i // 8] >> i % 8 & 1 else 1
        scale = half(block, 0) * (1 + 2 * nibble(scales, i // 32))
        values.append(scale * sign * codebook(quants.IQ3_S, entry, i % 4))
    return values


def decode_iq1_s(block: bytes) -> list[float]:
    values = []
    for part in range(32):
        packed = word(block[34:], part // 4, 2)
        scale = half(block, 0) * (2 * (packed >> 12 & 7) + 1)
        shift = -0.125 if packed >> 15 else 0.125
        entry = block[2 + part] | (packed >> 3 * (part % 4) & 7) << 8
        values += [scale * (codebook(quants.IQ1_S, entry, lane) + shift) for lane in range(8)]
    return values


def decode_iq1_m(block: bytes) -> list[float]:
    """The scale of all is in the upper four bits of the four words of scales."""
    high, scales = block[32:48], [word(block[48:], index, 2) for index in range(4)]
    packed = sum((scales[index] >> 12) << 4 * index for index in range(4))
    whole: float = struct.unpack("<e", struct.pack("<H", packed))[0]
    values = []
    for part in range(32):
        bits = nibble(high, part)
        scale = whole * (2 * (scales[part // 8] >> 3 * (part % 8 // 2) & 7) + 1)
        shift = -0.125 if bits >> 3 else 0.125
        entry = block[part] | (bits & 7) << 8
        values += [scale * (codebook(quants.IQ1_S, entry, lane) + shift) for lane in range(8)]
    return values


DECODERS = {
    GGMLQuantizationType.TQ1_0: decode_tq1_0,
    GGMLQuantizationType.TQ2_0: decode_tq2_0,
    GGMLQuantizationType.MXFP4: decode_mxfp4,
    GGMLQuantizationType.NVFP4: decode_nvfp4,
    GGMLQuantizationType.IQ4_NL: decode_iq4_nl,
    GGMLQuantizationType.IQ4_XS: decode_iq4_xs,
    GGMLQuantizationType.IQ2_XXS: decode_iq2_xxs,
    GGMLQuantizationType.IQ2_XS: decode_iq2_xs,
    GGMLQuantizationType.IQ2_S: decode_iq2_s,
    GGMLQuantizationType.IQ3_XXS: decode_iq3_xxs,
    GGMLQuantizationType.IQ3_S: decode_iq3_s,
    GGMLQuantizationType.IQ1_S: decode_iq1_s,
    GGMLQuantizationType.IQ1_M: decode_iq1_m,
}


def random_block(tensor_type: GGMLQuantizationType, source: random.Random) -> bytes:
    """Random bytes, but for scales that would be NaN or immense."""
    block = bytearray(source.randbytes(gguf.GGML_QUANT_SIZES[tensor_type][1]))
    scale = struct.pack("<e", source.gauss(0, 1))
    match tensor_type:
        case GGMLQuantizationType.MXFP4:
            block[0] = source.randrange(117, 137)
        case GGMLQuantizationType.NVFP4:
            block[:4] = bytes(source.randrange(127) for _ in range(4))
        case GGMLQuantizationType.TQ1_0 | GGMLQuantizationType.TQ2_0:
            block[-2:] = scale
        case GGMLQuantizationType.IQ1_M:
            for index in range(4):
                block[49 + 2 * index] = block[49 + 2 * index] & 15 | nibble(scale, index) << 4
        case _:
            block[:2] = scale
    return bytes(block)
