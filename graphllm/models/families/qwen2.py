"""Qwen2 and Qwen2.5 (Yang et al., 2024, arXiv:2407.10671): Llama with biases of queries, keys and values."""

from __future__ import annotations

from dataclasses import replace

from graphllm.models.config import ModelConfig
from graphllm.models.families.llama import LLAMA
from graphllm.models.family import Family
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_decoder import read_decoder_config, read_layer_types
from graphllm.models.hf_rope import FULL, SLIDING


def read_windowed_layers(config: HFConfig) -> list[str]:
    """Layer types where `use_sliding_window` gives layers from `max_window_layers` on a window."""
    num_layers = config.num_layers()
    first = config.get("max_window_layers", num_layers)
    window = config.get("sliding_window")
    uses_windows = config.flag("use_sliding_window", default=False) and window is not None
    default = [SLIDING if uses_windows and layer >= first else FULL for layer in range(num_layers)]
    layer_types = read_layer_types(config, default=default)
    if SLIDING in layer_types and not uses_windows:
        config.refuse("layer_types", "asks for windows, which 'use_sliding_window' denies")
    return layer_types


def read_config(config: HFConfig) -> ModelConfig:
    """The biases are no switch; nothing else has any."""
    config.get("seq_length")  # max_position_embeddings once more, in CodeQwen's files
    config.expect("rotary_emb_base", config.get("rope_theta"))
    base = read_decoder_config(config, attention_bias=True, layer_types=read_windowed_layers(config))
    return replace(base, max_position_embeddings=min(base.max_position_embeddings, _plain_context(config)))


def _plain_context(config: HFConfig) -> int:
    """How long a text may be before it is cut into chunks whose distances are counted anew.

    Dual chunk attention (An et al., 2024, arXiv:2402.17463) is plain attention within the first chunk; what
    lies behind it is not served.
    """
    if config.get("dual_chunk_attention_config") is None:
        return config.positive_int("max_position_embeddings")
    chunks = config.section("dual_chunk_attention_config")
    chunk, local = chunks.positive_int("chunk_size"), chunks.positive_int("local_size")
    for key in ("original_max_position_embeddings", "sparse_attention_enabled"):
        chunks.get(key)  # what matters to longer texts alone
    chunks.check_understood()
    if local >= chunk:
        chunks.refuse("local_size", f"is {local}, which leaves nothing of a chunk of {chunk}")
    return chunk - local


QWEN2 = Family(
    architectures=("Qwen2ForCausalLM",),
    read_config=read_config,
    weight_names=LLAMA.weight_names,
    ignored_weights=LLAMA.ignored_weights,
)
