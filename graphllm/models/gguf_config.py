"""A GGUF file's metadata said in the words of Hugging Face's config.json.

Owns the reading and checking of metadata values and the config synthesized from them. Does not
decide whether a family can compute it: the family's own config reader does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import isfinite, pi
from typing import Any, NoReturn

import numpy as np
from gguf import GGMLQuantizationType

from graphllm.errors import CheckpointError
from graphllm.models.gguf_architectures import GGUFArchitecture
from graphllm.models.gguf_file import GGUFFile

_ROPE_FACTORS = "rope_freqs.weight"
_DTYPES = {
    GGMLQuantizationType.F32: "float32",
    GGMLQuantizationType.F16: "float16",
    GGMLQuantizationType.BF16: "bfloat16",
}
# GGUF stores the sampling defaults of generation_config.json under names of its own.
_SAMPLING_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
_END_OF_GENERATION_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


class GGUFMetadata:
    """Checked access to the metadata under one architecture's prefix."""

    def __init__(self, file: GGUFFile, prefix: str) -> None:
        self.file = file
        self.prefix = prefix

    def positive_int(self, key: str, *, default: int | None = None) -> int:
        """A count; a list with one value for each layer counts as that value when all are equal."""

        def is_positive_int(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value > 0

        value = self._value(key, is_positive_int, "a positive integer", default)
        return int(value)

    def positive_float(self, key: str, *, default: float | None = None) -> float:
        """A number; stored as float32 and returned as its shortest decimal (1e-05, not 9.99...e-06)."""

        def is_positive_number(value: object) -> bool:
            return isinstance(value, (int, float)) and isfinite(value) and value > 0

        value = self._value(key, is_positive_number, "a positive number", default)
        return float(str(np.float32(value)))

    def has(self, key: str) -> bool:
        """Whether the key is present."""
        return f"{self.prefix}.{key}" in self.file.fields

    def text(self, key: str, *, default: str) -> str:
        """A string."""
        return str(self._value(key, lambda value: isinstance(value, str), "a string", default))

    def refuse(self, key: str, reason: str) -> NoReturn:
        """Raise CheckpointError naming file and key."""
        raise CheckpointError(f"{self.file.path}: metadata key '{self.prefix}.{key}' {reason}.")

    def _value(self, key: str, accepts: Callable[[object], bool], wanted: str, default: Any) -> Any:
        value = self.file.fields.get(f"{self.prefix}.{key}", default)
        if value is None:
            self.refuse(key, "is missing")
        if isinstance(value, list) and value:
            if any(item != value[0] for item in value):
                self.refuse(key, "differs from layer to layer, which is not supported")
            value = value[0]
        if not accepts(value):
            self.refuse(key, f"is {value!r}; it should be {wanted}")
        return value


def read_hf_config(file: GGUFFile, architecture: GGUFArchitecture) -> dict[str, Any]:
    """The config.json that this GGUF file's metadata and tensors amount to.

    Raises CheckpointError for keys that are missing, malformed, inconsistent or not understood.
    """
    metadata = GGUFMetadata(file, str(file.fields["general.architecture"]))
    _check_keys(metadata, architecture)
    hidden_size = metadata.positive_int("embedding_length")
    num_heads = metadata.positive_int("attention.head_count")
    vocab_size = _vocab_size(metadata, hidden_size)
    num_layers = metadata.positive_int("block_count")
    if (num_stored := architecture.num_layers(file.tensors)) != num_layers:
        metadata.refuse(
            "block_count", f"is {num_layers}, but the file has the tensors of {num_stored} layers"
        )
    config: dict[str, Any] = {
        "architectures": [architecture.hf_architecture],
        "model_type": architecture.model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": metadata.positive_int("feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.positive_int("attention.head_count_kv", default=num_heads),
        "head_dim": _head_dim(metadata, hidden_size, num_heads),
        "hidden_act": architecture.hidden_act,
        "max_position_embeddings": metadata.positive_int("context_length"),
        "rms_norm_eps": metadata.positive_float("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.positive_float("rope.freq_base", default=10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": _has_bias(file, "attn_"),
        "mlp_bias": _has_bias(file, "ffn_"),
        "torch_dtype": _dtype(file),
    }
    rope_scaling = _rope_scaling(metadata, config["rope_theta"], config["head_dim"])
    if rope_scaling is not None:
        config["rope_scaling"] = rope_scaling
    for key in ("bos_token_id", "eos_token_id"):
        if (token_id := _token_id(file, key, vocab_size=vocab_size)) is not None:
            config[key] = token_id
    return config


def read_generation_config(file: GGUFFile, vocab_size: int) -> dict[str, Any]:
    """The generation_config.json equivalent: all ids that end a generation, and sampling defaults."""
    config = {hf_key: file.fields[key] for key, hf_key in _SAMPLING_KEYS.items() if key in file.fields}
    end_ids = [_token_id(file, key, vocab_size=vocab_size) for key in _END_OF_GENERATION_KEYS]
    unique_ids = list(dict.fromkeys(token_id for token_id in end_ids if token_id is not None))
    if unique_ids:
        config["eos_token_id"] = unique_ids if len(unique_ids) > 1 else unique_ids[0]
    return config


def _token_id(file: GGUFFile, key: str, *, vocab_size: int) -> int | None:
    token_id = file.fields.get(f"tokenizer.ggml.{key}")
    if token_id is None:
        return None
    if not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
        raise CheckpointError(
            f"{file.path}: metadata key 'tokenizer.ggml.{key}' is {token_id!r}, "
            f"which is no token of a vocabulary of {vocab_size}."
        )
    return token_id


def _check_keys(metadata: GGUFMetadata, architecture: GGUFArchitecture) -> None:
    prefix = f"{metadata.prefix}."
    for name in metadata.file.fields:
        if name.startswith(prefix) and name.removeprefix(prefix) not in architecture.metadata_keys:
            metadata.refuse(name.removeprefix(prefix), "is not understood, and may change the mathematics")
    if metadata.file.fields.get(f"{prefix}expert_count", 0) != 0:
        metadata.refuse("expert_count", "is not 0; mixtures of experts in GGUF files are not supported")


def _vocab_size(metadata: GGUFMetadata, hidden_size: int) -> int:
    """Rows of the embedding, which the declared vocabulary and the token list must agree with."""
    file = metadata.file
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path}: it has no two-dimensional tensor 'token_embd.weight'.")
    vocab_size = embedding.shape[0]
    if embedding.shape[1] != hidden_size:
        metadata.refuse("embedding_length", f"disagrees with 'token_embd.weight', {list(embedding.shape)}")
    if metadata.positive_int("vocab_size", default=vocab_size) != vocab_size:
        metadata.refuse("vocab_size", f"disagrees with 'token_embd.weight', which has {vocab_size} rows")
    tokens = file.fields.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != vocab_size:
        raise CheckpointError(
            f"{file.path}: metadata key 'tokenizer.ggml.tokens' has {len(tokens)} entries, "
            f"but 'token_embd.weight' has {vocab_size} rows."
        )
    return vocab_size


def _head_dim(metadata: GGUFMetadata, hidden_size: int, num_heads: int) -> int:
    if metadata.has("attention.key_length"):
        head_dim = metadata.positive_int("attention.key_length")
    elif metadata.has("rope.dimension_count"):
        # Older converters wrote no key_length; in this layout rotary covers the whole head.
        head_dim = metadata.positive_int("rope.dimension_count")
    elif hidden_size % num_heads:
        metadata.refuse("attention.head_count", f"is {num_heads}, which does not divide {hidden_size}")
    else:
        head_dim = hidden_size // num_heads
    for key in ("rope.dimension_count", "attention.value_length"):
        if metadata.positive_int(key, default=head_dim) != head_dim:
            metadata.refuse(key, f"differs from the head's {head_dim} dimensions, which is not supported")
    return head_dim


def _has_bias(file: GGUFFile, tensor_prefix: str) -> bool:
    return any(name.endswith(".bias") and f".{tensor_prefix}" in name for name in file.tensors)


def _dtype(file: GGUFFile) -> str:
    """The format that holds most of the matrices; quantized ones are bfloat16, their range and more."""
    num_bytes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        if len(tensor.shape) > 1:
            num_bytes[_DTYPES.get(tensor.type, "bfloat16")] += tensor.num_bytes
    return num_bytes.most_common(1)[0][0]


def _rope_scaling(metadata: GGUFMetadata, rope_theta: float, head_dim: int) -> dict[str, Any] | None:
    """The rope_scaling entry: linear from the metadata, or llama3 from the table of factors."""
    factor_key = "rope.scaling.factor" if metadata.has("rope.scaling.factor") else "rope.scale_linear"
    factor = metadata.positive_float(factor_key, default=1.0)
    # A factor without a type has always meant linear interpolation.
    scaling_type = metadata.text("rope.scaling.type", default="linear")
    if scaling_type not in ("none", "linear"):
        metadata.refuse("rope.scaling.type", f"is {scaling_type!r}; 'none' and 'linear' are supported")
    is_linear = scaling_type == "linear" and factor != 1.0
    if _ROPE_FACTORS not in metadata.file.tensors:
        return {"rope_type": "linear", "factor": factor} if is_linear else None
    if is_linear:
        metadata.refuse(factor_key, f"and the tensor {_ROPE_FACTORS!r} both scale the rotary frequencies")
    return _llama3_scaling(metadata, rope_theta, head_dim)


def _llama3_scaling(metadata: GGUFMetadata, rope_theta: float, head_dim: int) -> dict[str, Any]:
    """Recognize the factors that Llama 3.1's scaling rule gives; refuse any others.

    The file keeps the outcome of the rule, one divisor for each frequency, and not its parameters.
    All releases share low 1, high 4 and a context of 8192; only the factor differs.
    """
    path = metadata.file.path
    factors = metadata.file.read_float32(_ROPE_FACTORS)
    if factors.shape != (head_dim // 2,):
        raise CheckpointError(
            f"{path}: tensor {_ROPE_FACTORS!r} has shape {list(factors.shape)}, not [{head_dim // 2}]."
        )
    factor = float(f"{factors.max():.6g}")  # without what float32 adds to 32
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": metadata.positive_int(
            "rope.scaling.original_context_length", default=8192
        ),
    }
    is_llama3 = factor >= 1.0 and np.allclose(
        factors, _llama3_factors(rope_theta, head_dim, scaling), rtol=1e-4, atol=0.0
    )
    if not is_llama3:
        raise CheckpointError(
            f"{path}: tensor {_ROPE_FACTORS!r} does not follow Llama 3.1's scaling rule, "
            "and other tables of rotary factors are not supported."
        )
    return scaling


def _llama3_factors(rope_theta: float, head_dim: int, scaling: dict[str, Any]) -> Sequence[float]:
    """What each rotary frequency is divided by (the rule of Meta's Llama 3.1 reference code).

    Long wavelengths are divided by `factor`, short ones by 1; in between the frequency is interpolated.
    """
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for index in range(head_dim // 2):
        wavelength = 2 * pi * rope_theta ** (2 * index / head_dim)
        rotations = scaling["original_max_position_embeddings"] / wavelength
        smooth = min(max((rotations - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors
