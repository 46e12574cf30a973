"""A decoder's mathematics in numbers and switches.

Fields name mathematics, never model families. Reading them from a checkpoint is `hf_config.py`'s and the
families' job.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from graphllm.cache.kv_cache import KVCacheShape
from graphllm.cache.kv_groups import KVGroups, group_layers
from graphllm.kernels.gated_activation import Activation
from graphllm.layers.attention import QKNormConfig
from graphllm.layers.latent_attention import LatentConfig
from graphllm.layers.moe import MoEConfig
from graphllm.layers.norm import NormConfig
from graphllm.layers.rotary import RotaryConfig

NormPlacement = Literal["input", "output", "both", "sum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """What may differ from one layer to the next.

    rotary None: queries and keys are not turned. sliding_window: how many tokens a query sees, itself
    included; None for all before it. moe: the mixture of experts that stands in for the feed-forward layer.
    """

    rotary: RotaryConfig | None
    sliding_window: int | None = None
    moe: MoEConfig | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What `Decoder` needs to know to compute what the model's authors trained.

    Attention: num_heads is a multiple of num_kv_heads; consecutive query heads share a key/value head.
    attention_scale multiplies q.k; attention_softcap bounds the scores (`kernels/paged_attention.py`).
    has_sinks: each head has a learned logit that takes part in the softmax and has no value. latent: heads
    come out of latents, which are what is cached; attention_bias is then that of all projections but those
    out of them.
    is_causal: a query sees no later key; without it a prompt is computed in one step, and a sliding_window
    reaches as far to either side. attention_bias is that of query, key and value, attention_output_bias that
    of the projection behind them. qk_norm: query and key heads are normalized before rotary. alibi_scale: a
    query's scores fall linearly with a key's distance (Press et al., 2021, arXiv:2108.12409), by so many
    times each head's slope; None for scores that do not.

    Feed-forward: down(f(gate(x)) * up(x)) where is_gated, else down(f(up(x))); mlp_bias is of all its
    projections.

    Residual stream: norm_placement says where a layer's norms stand. "input": before attention and
    feed-forward; "output": behind them, before the sum; "both"; "sum": on the sum, which is the stream from
    there on, and then there is no final norm (Xiong et al., 2020, arXiv:2002.04745, compare the last with
    the first). is_parallel: attention and feed-forward both see the layer's input (Wang, 2021, GPT-J),
    through one norm or, with has_parallel_mlp_norm, one each. residual_multiplier scales what is added.

    Ends: embedding_multiplier scales embeddings. embedding_size is theirs where it is not hidden_size: then
    one projection leads to the stream and one back to the head. num_learned_positions: rows of the table
    of learned positions, of which the first `learned_position_offset` stand for none; 0 for no table.
    num_token_types: rows of the table of token types, 0 for no table; the first `num_used_token_types` are
    folded into the embedding, so that a token of type k is row k vocab_size / num_used_token_types + its id.
    has_embedding_norm: the stream begins with a norm of the sum of all these. has_head: without it there are
    no logits, and hidden states are all that can be asked for. head_bias adds to the logits, which are
    multiplied by logit_multiplier and bounded by logit_softcap, c tanh(logit / c).

    max_position_embeddings: the longest context, in tokens. dtype is the checkpoint's own, None when it
    names none that is served. bos_token_id and eos_token_ids are config.json's; tokenizer and
    generation_config.json may know better.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[LayerConfig, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm: NormConfig
    norm_placement: NormPlacement = "input"
    is_parallel: bool = False
    has_parallel_mlp_norm: bool = False
    residual_multiplier: float = 1.0
    attention_scale: float
    attention_softcap: float | None = None
    is_causal: bool = True
    has_sinks: bool = False
    latent: LatentConfig | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    qk_norm: QKNormConfig | None = None
    alibi_scale: float | None = None
    activation: Activation
    is_gated: bool = True
    mlp_bias: bool = False
    embedding_size: int | None = None
    embedding_multiplier: float | None = None
    num_learned_positions: int = 0
    learned_position_offset: int = 0
    num_token_types: int = 0
    num_used_token_types: int = 1
    has_embedding_norm: bool = False
    has_head: bool = True
    tie_word_embeddings: bool
    head_bias: bool = False
    logit_multiplier: float = 1.0
    logit_softcap: float | None = None
    dtype: torch.dtype | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def kv_groups(self, *, max_model_len: int) -> KVGroups:
        """Which layers share block tables where no sequence is longer than `max_model_len` tokens."""
        return group_layers([layer.sliding_window for layer in self.layers], max_model_len=max_model_len)

    def kv_cache_shape(
        self, *, block_size: int, dtype: torch.dtype, max_model_len: int | None = None
    ) -> KVCacheShape:
        """What the model keeps of a token; dtype: of the cache.

        max_model_len: of sequences; None for whoever has but one block table, so all layers keep everything.
        """
        is_latent = self.latent is not None
        return KVCacheShape(
            num_layers=self.num_layers,
            num_kv_heads=1 if is_latent else self.num_kv_heads,
            head_dim=self.latent.width if self.latent is not None else self.head_dim,
            block_size=block_size,
            dtype=dtype,
            is_latent=is_latent,
            kv_groups=None if max_model_len is None else self.kv_groups(max_model_len=max_model_len),
        )

    def one_layer_of_each_kind(self) -> ModelConfig:
        """The smallest decoder that launches every kernel of this one."""
        return replace(self, layers=tuple(dict.fromkeys(self.layers)))


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
