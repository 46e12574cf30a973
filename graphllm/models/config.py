"""A decoder's mathematics in numbers and switches.

Fields name mathematics, never model families. Reading them from a checkpoint is `hf_config.py`'s and the
families' job.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphllm.kernels.gated_activation import Activation
from graphllm.layers.rotary import RopeScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What `Decoder` needs to know to compute what the model's authors trained.

    num_heads is a multiple of num_kv_heads; consecutive query heads share a key/value head.
    attention_scale multiplies q.k. attention_bias is that of query, key and value, attention_output_bias
    that of the projection behind them; mlp_bias is of all three projections of the feed-forward layer.
    dtype is the checkpoint's own, None when it names none that is served. bos_token_id and eos_token_ids
    are config.json's; tokenizer and generation_config.json may know better.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    attention_scale: float
    attention_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    activation: Activation
    tie_word_embeddings: bool
    dtype: torch.dtype | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
