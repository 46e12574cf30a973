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
    qk_norm: each query and key head passes an RMS norm over head_dim, with a learned factor for each
    dimension, before rotary (Henry et al., 2020, arXiv:2010.04245, with an RMS norm instead of the L2 norm).
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
    qk_norm: bool = False
    dtype: torch.dtype | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


def resolve_dtype(asked: str, checkpoint_dtype: torch.dtype | None, *, device_type: str) -> torch.dtype:
    """The number format of weights and activations.

    asked: `--dtype`. checkpoint_dtype: `ModelConfig.dtype`. device_type: "cpu" or "cuda". "auto" is float32
    on a CPU, where most have no units for anything narrower, and elsewhere the checkpoint's own format if
    that has 16 bits, else bfloat16.
    """
    if asked != "auto":
        dtype = getattr(torch, asked)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if device_type == "cpu":
        return torch.float32
    return checkpoint_dtype if checkpoint_dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
