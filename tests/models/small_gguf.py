"""Small GGUF files for tests: a whole little Llama, and headers written field by field to be wrong."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

HIDDEN_SIZE = 32
INTERMEDIATE_SIZE = 64
NUM_LAYERS = 2
NUM_HEADS = 4
NUM_KV_HEADS = 2
HEAD_DIM = 8

# The 256 bytes as byte-level BPE spells them, and one merge.
BYTE_TOKENS = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
TOKENS = [*BYTE_TOKENS, "hi", "<|end|>"]
VOCAB_SIZE = len(TOKENS)
END_TOKEN_ID = VOCAB_SIZE - 1

METADATA: dict[str, Any] = {
    "llama.block_count": NUM_LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN_SIZE,
    "llama.feed_forward_length": INTERMEDIATE_SIZE,
    "llama.attention.head_count": NUM_HEADS,
    "llama.attention.head_count_kv": NUM_KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.vocab_size": VOCAB_SIZE,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [1] * (VOCAB_SIZE - 1) + [3],
    "tokenizer.ggml.merges": ["h i"],
    "tokenizer.ggml.bos_token_id": END_TOKEN_ID,
    "tokenizer.ggml.eos_token_id": END_TOKEN_ID,
    "tokenizer.ggml.add_bos_token": False,
}


def small_tensors(*, tied: bool = True) -> dict[str, npt.NDArray[np.float32]]:
    """GGUF name to float32 values, row-major, random but always the same."""
    shapes = {"token_embd.weight": (VOCAB_SIZE, HIDDEN_SIZE), "output_norm.weight": (HIDDEN_SIZE,)}
    if not tied:
        shapes["output.weight"] = (VOCAB_SIZE, HIDDEN_SIZE)
    for layer in range(NUM_LAYERS):
        for name, shape in {
            "attn_norm": (HIDDEN_SIZE,),
            "attn_q": (NUM_HEADS * HEAD_DIM, HIDDEN_SIZE),
            "attn_k": (NUM_KV_HEADS * HEAD_DIM, HIDDEN_SIZE),
            "attn_v": (NUM_KV_HEADS * HEAD_DIM, HIDDEN_SIZE),
            "attn_output": (HIDDEN_SIZE, NUM_HEADS * HEAD_DIM),
            "ffn_norm": (HIDDEN_SIZE,),
            "ffn_gate": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
            "ffn_up": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
            "ffn_down": (HIDDEN_SIZE, INTERMEDIATE_SIZE),
        }.items():
            shapes[f"blk.{layer}.{name}.weight"] = shape
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write_small_llama(
    path: Path,
    metadata: Mapping[str, Any] | None = None,
    *,
    without: Sequence[str] = (),
    tensors: Mapping[str, npt.NDArray[Any]] | None = None,
    tensor_type: GGMLQuantizationType = GGMLQuantizationType.F32,
    types: Mapping[str, GGMLQuantizationType] | None = None,
    architecture: str = "llama",
) -> Path:
    """Write a whole little Llama.

    metadata: added to or put in place of METADATA; without: keys and tensors left out; tensors: in
    place of `small_tensors()`; tensor_type: of all matrices (vectors stay F32), but for those that
    types names by a part of their names.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**METADATA, **(metadata or {})}.items():
        if key not in without:
            _add_field(writer, key, value)
    for name, values in (small_tensors() if tensors is None else tensors).items():
        if name in without:
            continue
        own_type = next((kind for part, kind in (types or {}).items() if part in name), tensor_type)
        if values.dtype == np.float32 and values.ndim > 1 and own_type is not GGMLQuantizationType.F32:
            quantized = gguf.quantize(values, own_type)
            writer.add_tensor(name, quantized, raw_dtype=own_type)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_field(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


def string(text: str | bytes) -> bytes:
    """A GGUF string: its length, then its bytes."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def field(key: str | bytes, value_type: int, data: bytes) -> bytes:
    """One metadata field."""
    return string(key) + struct.pack("<I", value_type) + data


def tensor_entry(
    name: str, shape: Sequence[int] = (8,), tensor_type: int = GGMLQuantizationType.F32, offset: int = 0
) -> bytes:
    """One entry of the tensor table; shape as torch counts."""
    dimensions = struct.pack(f"<{len(shape)}Q", *reversed(shape))
    return string(name) + struct.pack("<I", len(shape)) + dimensions + struct.pack("<IQ", tensor_type, offset)


def raw_gguf(
    fields: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    *,
    data: bytes = b"",
    magic: bytes = b"GGUF",
    version: int = 3,
) -> bytes:
    """A GGUF file of parts that need not make sense, its data aligned to 32 bytes."""
    header = magic + struct.pack("<IQQ", version, len(tensors), len(fields))
    header += b"".join(fields) + b"".join(tensors)
    return header + b"\0" * (-len(header) % 32) + data


ARCHITECTURE_FIELD = field("general.architecture", GGUFValueType.STRING, string("llama"))
