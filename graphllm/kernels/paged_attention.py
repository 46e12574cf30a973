"""Attention over a paged KV cache, for a batch that mixes decode rows and prefill rows.

A row r has context_len L tokens in its cache blocks, of which the last n = query_len are this step's
queries. For query j (at position p = L - n + j), head h, and its key/value head g = h // (H / H_kv):

    visible(i) = i <= p, and i > p - sliding_window where there is a window
                 all i < L without causality, where n = L; |i - p| < sliding_window where there is a window
    score_i    = cap(scale * q_{j,h} . k_{i,g}) + slope_h * i   for visible i; no slopes, no second term
    cap(s)     = c tanh(s / c), or s without softcap
    weight_i   = exp(score_i) / (sum_i' exp(score_i') + exp(sink_h)), in float32; no sink, no second term
    y_{j,h}    = sum_i weight_i * v_{i,g}

Token i of the row lies in slot block_table[i // block_size] * block_size + i % block_size. Only slots of
tokens that some query of the row sees are read: what others hold (NaN included) never matters. Where the
cache keeps 8 bits, k_{i,g} = key_cache * key_scale[slot, g], and v likewise. Soft capping is Gemma 2's
(arXiv:2408.00118); sinks are learned logits without a value (arXiv:2309.17453, as gpt-oss has them). Slopes
are ALiBi's (arXiv:2108.12409), whose penalty slope_h * (p - i) differs by what all of a query's scores share,
which changes nothing without a sink; with one there is no ALiBi.

`paged_attention_ref` says this row by row; the kernels of paged_decode_attention.py and
paged_prefill_attention.py are held to it. `gathered_attention` is the CPU path for rows of like shape: it
copies their keys and values into scratch memory and attends all of them in one call. (Fresh memory for the
copies would cost ten times the copies, in page faults; a call a row would cost more in dispatch than the
mathematics.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from graphllm.kernels.gather_kv import gather_kv_cpu


def paged_attention_ref(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    block_tables: Tensor,
    row_slots: Tensor,
    query_lens: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool = True,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor:
    """The specification. Scores, softmax and sums in float32.

    query: [num_tokens, num_heads, head_dim], rows one after the other; caches: [num_blocks, block_size,
    num_kv_heads, head_dim]; block_tables: [num_slots, max_blocks]; row_slots, query_lens, context_lens:
    [num_rows], rows without tokens allowed; sinks, slopes: [num_heads]; key_scale, value_scale: [num_blocks,
    block_size, num_kv_heads], for caches in 8 bits. Returns query's shape and dtype, zeros for tokens that
    belong to no row.
    """
    block_size, num_kv_heads = key_cache.shape[1:3]
    output, start = torch.zeros_like(query), 0
    for row_slot, query_len, context_len in zip(
        row_slots.tolist(), query_lens.tolist(), context_lens.tolist(), strict=True
    ):
        first = 0 if sliding_window is None else max(0, context_len - query_len + 1 - sliding_window)
        positions = torch.arange(first, context_len, device=query.device)
        slots = block_tables[row_slot][positions // block_size].long(), positions % block_size
        keys = _meant(key_cache[slots], key_scale, slots)
        values = _meant(value_cache[slots], value_scale, slots)
        queries = query[start : start + query_len].float().unflatten(1, (num_kv_heads, -1))
        scores = torch.einsum("qgrd,kgd->grqk", queries, keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if slopes is not None:
            scores = scores + slopes.float().view(num_kv_heads, -1, 1, 1) * positions
        assert is_causal or query_len == context_len, "without causality rows are whole prompts"
        query_positions = torch.arange(context_len - query_len, context_len, device=query.device)[:, None]
        visible = positions <= query_positions  # [query_len, num_keys] bool
        if not is_causal:
            visible = torch.ones_like(visible)
            if sliding_window is not None:
                visible &= positions < query_positions + sliding_window
        if sliding_window is not None:
            visible &= positions > query_positions - sliding_window
        scores = scores.masked_fill(~visible, -torch.inf)
        if sinks is not None:
            sink = sinks.float().view(num_kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, sink), dim=-1)
        weights = scores.softmax(dim=-1)[..., : len(positions)]
        attended = torch.einsum("grqk,kgd->qgrd", weights, values).flatten(1, 2)
        output[start : start + query_len] = attended.to(query.dtype)
        start += query_len
    return output


def _meant(stored: Tensor, scale: Tensor | None, slots: tuple[Tensor, Tensor]) -> Tensor:
    """What a cache means by what it stores: [num_keys, num_kv_heads, head_dim] float32."""
    return stored.float() if scale is None else stored.float() * scale[slots][..., None]


def gathered_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    slots: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    scratch: tuple[Tensor, Tensor],
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    gather_scratch: Tensor | None = None,
) -> Tensor:
    """Attention of rows with the same number of queries over contexts padded to the same length.

    query: [num_rows, query_len, num_heads, head_dim]; caches and scales as above, contiguous; slots:
    [num_rows * max_context] int64, padding included, none of which may hold NaN; mask: [num_rows or 1, 1,
    query_len or 1, max_context] of query's dtype, added to the scores, or None; is_causal: token i of a row
    sees its first i + 1 keys (only where there is no mask and query_len = max_context); scratch: two tensors
    of [num_rows * max_context, num_kv_heads * head_dim], overwritten, of query's dtype for caches in 8 bits
    and of the caches' else; gather_scratch: as `gather_kv_cpu` wants it.
    Returns [num_rows, query_len, num_heads, head_dim].
    """
    num_rows, num_kv_heads, head_dim = query.shape[0], key_cache.shape[2], key_cache.shape[3]
    for cache, cache_scale, memory in zip(
        (key_cache, value_cache), (key_scale, value_scale), scratch, strict=True
    ):
        out = memory.view(-1, num_kv_heads, head_dim)
        gather_kv_cpu(cache, cache_scale, slots, out=out, scratch=gather_scratch)
    keys, values = (  # [num_rows, num_kv_heads, max_context, head_dim]
        gathered.view(num_rows, -1, num_kv_heads, head_dim).transpose(1, 2).to(query.dtype)
        for gathered in scratch
    )
    return F.scaled_dot_product_attention(
        query.transpose(1, 2),
        keys,
        values,
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[2] != num_kv_heads,
    ).transpose(1, 2)
