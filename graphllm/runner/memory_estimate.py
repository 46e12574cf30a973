"""What a model takes on a device before any of it is there: from its configuration alone.

Owns the sizes of weights, of places for adapters, of a step's intermediates and of the step tables. The first
two are exact; the others follow what the decoder and `StepBuffers` allocate, and are replaced by measurements
at start.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from graphllm.attention.paged import PagedAttention
from graphllm.kernels.linear import linear_ref
from graphllm.layers.lora import AdapterLayout
from graphllm.layers.norm import Norm
from graphllm.models.adaptable import adaptable_layers
from graphllm.models.config import ModelConfig
from graphllm.models.decoder import Decoder
from graphllm.models.quantization import ModelQuantization
from graphllm.quant.scheme_source import one_scheme
from graphllm.quant.unquantized import Unquantized
from graphllm.runner.memory_plan import StepLimits, num_logit_lines
from graphllm.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS

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


def weight_bytes(
    config: ModelConfig, dtype: torch.dtype, *, quantization: ModelQuantization | None = None
) -> WeightBytes:
    """The parameters that `Decoder` has with this configuration, those of plain numbers in `dtype`.

    Counted on the decoder itself, built without memory.
    """
    model = _outline(config, dtype, quantization)
    by_part = dict.fromkeys((field.name for field in fields(WeightBytes)), 0)
    for name, module in model.named_modules():
        size = sum(parameter.nbytes for parameter in module.parameters(recurse=False))
        if isinstance(module, Norm):
            by_part["norms"] += size
        elif ".attention." in name:
            by_part["attention"] += size
        elif ".mlp" in name or ".moe" in name:
            by_part["feed_forward"] += size
        elif module is model.head:
            by_part["head"] += 0 if config.tie_word_embeddings else size
        else:
            by_part["embedding"] += size
    return WeightBytes(**by_part)


def adapter_bytes(config: ModelConfig, dtype: torch.dtype, *, max_loras: int, max_rank: int) -> int:
    """The device's places for LoRA adapters, exactly; counted like the weights."""
    layers = adaptable_layers(_outline(config, dtype))
    return max_loras * AdapterLayout(layers, max_rank=max_rank, dtype=dtype).num_bytes


def _outline(
    config: ModelConfig, dtype: torch.dtype, quantization: ModelQuantization | None = None
) -> Decoder:
    """The decoder without memory."""
    plain = one_scheme(Unquantized(linear_ref))
    return Decoder(
        config,
        backend=PagedAttention(block_size=1),
        schemes=plain if quantization is None else quantization.schemes(config, linear_ref),
        device=torch.device("meta"),
        dtype=dtype,
    )


def estimate_arena_bytes(
    config: ModelConfig, dtype: torch.dtype, *, limits: StepLimits, max_num_seqs: int
) -> int:
    """Intermediates of the largest step, as decoder and sampler share them in the arena."""
    query_size, latent = config.num_heads * config.head_dim, config.latent
    up_sizes, inner_sizes, routing_sizes = [0], [query_size], [0]
    if latent is None:
        up_sizes.append(query_size + 2 * config.num_kv_heads * config.head_dim)
    else:  # queries, before and behind attention
        up_sizes += [config.num_heads * size for size in (latent.width, latent.value_dim)]
        inner_sizes.append(config.num_heads * latent.key_value_rank)
    for moe in {layer.moe for layer in config.layers}:
        size = config.intermediate_size if moe is None else moe.shared_intermediate_size
        up_sizes.append((1 + config.is_gated) * size)
        inner_sizes.append(size)
        if moe is not None:  # a row for each of a token's experts
            top_k = moe.routing.top_k
            up_sizes.append(top_k * config.hidden_size)
            inner_sizes.append(top_k * moe.expert_intermediate_size)
            routing_sizes.append(moe.routing.num_experts + moe.has_shared_gate + 2 * top_k)
    rotaries = {layer.rotary for layer in config.layers if layer.rotary is not None}
    values_per_token = (
        3 * config.hidden_size  # residual, normed, delta
        + max(up_sizes)  # into attention, into the feed-forward layer; out of the experts
        + max(inner_sizes)  # out of attention, between the projections of the feed-forward layer
        + _latent_size(config)
        + sum(rotary.num_tables * rotary.rotary_dim for rotary in rotaries)  # cosines and sines
    )
    bytes_per_token = values_per_token * dtype.itemsize + 4 * max(routing_sizes)
    decoder = limits.max_num_batched_tokens * bytes_per_token
    return decoder + 4 * max_num_seqs * config.vocab_size + _SCRATCH_BYTES


def _latent_size(config: ModelConfig) -> int:
    """A token's latents as they come, and that of its queries normed."""
    latent = config.latent
    return 0 if latent is None else 2 * (latent.query_rank or 0) + latent.width


def estimate_table_bytes(config: ModelConfig, limits: StepLimits, *, max_num_seqs: int) -> int:
    """Slot tables, step inputs, logits and masks of the sampled rows, scores of prompt tokens."""
    num_groups = config.kv_groups(max_model_len=limits.max_model_len).num_groups
    ids_per_slot = limits.max_model_len + 1 + num_groups * limits.table_width
    bytes_per_slot = 4 * ids_per_slot + 8 * MAX_LOGIT_BIAS + _SAMPLING_BYTES_PER_SLOT
    num_logits = num_logit_lines(limits, max_num_seqs) * config.vocab_size
    # Id, position and places in the cache; where and what is scored, logprob and rank, the alternatives.
    bytes_per_token = (2 + num_groups) * 8 + 2 * 8 + 2 * 4 + MAX_LOGPROBS * (8 + 4)
    return (
        (limits.num_slots + 1) * bytes_per_slot
        + 4 * num_logits
        + max_num_seqs * (config.vocab_size // 8)
        + limits.max_num_batched_tokens * bytes_per_token
    )
