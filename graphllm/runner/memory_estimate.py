"""What a model takes on a device before any of it is there: from its configuration alone.

Owns the sizes of weights, of a step's intermediates and of the step tables. The first are exact; the
others follow what the decoder and `StepBuffers` allocate, and are replaced by measurements at start.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphllm.models.config import ModelConfig
from graphllm.runner.memory_plan import StepLimits
from graphllm.sampling_params import MAX_LOGIT_BIAS

# Split-KV partial results, the sampler's lists, the products' workspaces: all of fixed grids.
_SCRATCH_BYTES = 128 * 1024**2
# Sampling parameters beside the biases: floats, integers, stop tokens.
_SAMPLING_BYTES_PER_SLOT = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBytes:
    """Bytes of a model's parameters by part; `head` is 0 where it is the embedding's."""

    embedding: int
    attention: int
    feed_forward: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        return self.embedding + self.attention + self.feed_forward + self.norms + self.head


def weight_bytes(config: ModelConfig, dtype: torch.dtype) -> WeightBytes:
    """The parameters that `Decoder` has with this configuration, all of them in `dtype`."""
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_layers
    query_size = config.num_heads * config.head_dim
    qkv_size = query_size + 2 * config.num_kv_heads * config.head_dim
    attention = hidden * qkv_size + query_size * hidden
    attention += qkv_size * config.attention_bias + hidden * config.attention_output_bias
    feed_forward = 3 * hidden * inner + (2 * inner + hidden) * config.mlp_bias
    layer_norms = 2 * hidden + 2 * config.head_dim * config.qk_norm
    size = dtype.itemsize
    return WeightBytes(
        embedding=size * config.vocab_size * hidden,
        attention=size * layers * attention,
        feed_forward=size * layers * feed_forward,
        norms=size * (layers * layer_norms + hidden),
        head=0 if config.tie_word_embeddings else size * config.vocab_size * hidden,
    )


def estimate_arena_bytes(
    config: ModelConfig, dtype: torch.dtype, *, limits: StepLimits, max_num_seqs: int
) -> int:
    """Intermediates of the largest step, as decoder and sampler share them in the arena."""
    query_size = config.num_heads * config.head_dim
    qkv_size = query_size + 2 * config.num_kv_heads * config.head_dim
    values_per_token = (
        3 * config.hidden_size  # residual, normed, delta
        + max(qkv_size, 2 * config.intermediate_size)  # into attention, into the feed-forward layer
        + max(query_size, config.intermediate_size)  # out of them
        + 2 * config.head_dim  # cosines and sines
    )
    decoder = limits.max_num_batched_tokens * values_per_token * dtype.itemsize
    return decoder + 4 * max_num_seqs * config.vocab_size + _SCRATCH_BYTES


def estimate_table_bytes(config: ModelConfig, limits: StepLimits, *, max_num_seqs: int) -> int:
    """Slot tables, step inputs, and the logits and masks of the sampled rows."""
    ids_per_slot = limits.max_model_len + 1 + limits.max_blocks_per_sequence
    bytes_per_slot = 4 * ids_per_slot + 8 * MAX_LOGIT_BIAS + _SAMPLING_BYTES_PER_SLOT
    bytes_per_row = 4 * config.vocab_size + config.vocab_size // 8
    bytes_per_token = 3 * 8  # id, position, place in the cache
    return (
        (limits.num_slots + 1) * bytes_per_slot
        + max_num_seqs * bytes_per_row
        + limits.max_num_batched_tokens * bytes_per_token
    )
