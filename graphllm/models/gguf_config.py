"""A GGUF file's metadata said in the words of Hugging Face's config.json.

Owns what all architectures say alike, and generation defaults. What one of them says in words of its own is
in `gguf_settings.py`, rotary in `gguf_rope.py`. Does not decide whether a family can compute it: the
family's own config reader does.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from gguf import GGMLQuantizationType

from graphllm.errors import CheckpointError
from graphllm.models.gguf_architectures import GGUFArchitecture, layer_indices
from graphllm.models.gguf_arrangements import Heads
from graphllm.models.gguf_file import GGUFFile
from graphllm.models.gguf_metadata import GGUFMetadata
from graphllm.models.gguf_rope import read_rotary

_DTYPES = {
    GGMLQuantizationType.F32: "float32",
    GGMLQuantizationType.F16: "float16",
    GGMLQuantizationType.BF16: "bfloat16",
}
_EPS_KEYS = {"rms": "attention.layer_norm_rms_epsilon", "layer": "attention.layer_norm_epsilon"}
# GGUF stores the sampling defaults of generation_config.json under names of its own.
_SAMPLING_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
_END_OF_GENERATION_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def read_hf_config(metadata: GGUFMetadata, architecture: GGUFArchitecture) -> tuple[dict[str, Any], Heads]:
    """The config.json that this GGUF file's metadata and tensors amount to, and its heads.

    Raises CheckpointError for keys that are missing, malformed, inconsistent or not understood.
    """
    file = metadata.file
    hidden_size = metadata.positive_int("embedding_length")
    vocab_size = _vocab_size(metadata, hidden_size)
    num_heads = metadata.positive_int("attention.head_count")
    config: dict[str, Any] = {
        "architectures": [architecture.hf_architecture],
        "model_type": architecture.model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": metadata.positive_int("feed_forward_length"),
        "num_hidden_layers": _num_layers(metadata),
        "num_attention_heads": num_heads,
        "max_position_embeddings": metadata.positive_int("context_length"),
        architecture.eps_key: metadata.positive_float(_EPS_KEYS[architecture.norm]),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": _dtype(file),
        **architecture.constants,
    }
    _read_heads(metadata, architecture, config)
    if architecture.rotary is not None:
        read_rotary(metadata, config, architecture.rotary)
    for read_settings in architecture.settings:
        read_settings(metadata, config)
    metadata.check_understood()
    heads = Heads(num_heads, config["num_key_value_heads"], config["head_dim"])
    for key in ("bos_token_id", "eos_token_id"):
        if (token_id := _token_id(file, key, vocab_size=vocab_size)) is not None:
            config[key] = token_id
    return {architecture.renames.get(key, key): value for key, value in config.items()}, heads


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


def _num_layers(metadata: GGUFMetadata) -> int:
    """Layers that count: behind them there may be some that predict further tokens."""
    num_blocks = metadata.positive_int("block_count")
    num_stored = len(layer_indices(metadata.file.tensors))
    if num_stored != num_blocks:
        metadata.refuse(
            "block_count", f"is {num_blocks}, but the file has the tensors of {num_stored} layers"
        )
    num_spare = metadata.non_negative_int("nextn_predict_layers", default=0)
    if num_spare >= num_blocks:
        metadata.refuse("nextn_predict_layers", f"is {num_spare}, and leaves none of {num_blocks} layers")
    return num_blocks - num_spare


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


def _read_heads(metadata: GGUFMetadata, architecture: GGUFArchitecture, config: dict[str, Any]) -> None:
    num_heads = config["num_attention_heads"]
    num_kv_heads = metadata.positive_int("attention.head_count_kv", default=num_heads)
    if architecture.has_latent_heads:
        # What a file says of key heads is of the latent form: one that all heads share.
        if num_kv_heads not in (1, num_heads):
            metadata.refuse("attention.head_count_kv", f"is {num_kv_heads}, which latent attention has not")
        config["num_key_value_heads"] = num_heads
        config["head_dim"] = metadata.positive_int("rope.dimension_count")
        return
    if num_heads % num_kv_heads:
        metadata.refuse("attention.head_count_kv", f"is {num_kv_heads}, which does not divide {num_heads}")
    config["num_key_value_heads"] = num_kv_heads
    config["head_dim"] = _head_dim(metadata, architecture, config)


def _head_dim(metadata: GGUFMetadata, architecture: GGUFArchitecture, config: dict[str, Any]) -> int:
    hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
    turns_whole = architecture.rotary is not None and not architecture.rotary.is_partial
    if metadata.has("attention.key_length"):
        head_dim = metadata.positive_int("attention.key_length")
    elif turns_whole and metadata.has("rope.dimension_count"):
        # Older converters wrote no key_length; in this layout rotary covers the whole head.
        head_dim = metadata.positive_int("rope.dimension_count")
    elif hidden_size % num_heads:
        metadata.refuse("attention.head_count", f"is {num_heads}, which does not divide {hidden_size}")
    else:
        head_dim = hidden_size // num_heads
    if metadata.positive_int("attention.value_length", default=head_dim) != head_dim:
        metadata.refuse(
            "attention.value_length", f"differs from the head's {head_dim} dimensions, which is not supported"
        )
    return head_dim


def _dtype(file: GGUFFile) -> str:
    """The format that holds most of the matrices; quantized ones are bfloat16, their range and more."""
    num_bytes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        if len(tensor.shape) > 1:
            num_bytes[_DTYPES.get(tensor.type, "bfloat16")] += tensor.num_bytes
    return num_bytes.most_common(1)[0][0]
