"""Causal attention over a paged cache of latents that all heads share (DeepSeek-V2, arXiv:2405.04434, 2.1).

Of a token the cache holds one vector c of rank + turned dimensions: the normalized latent, and the turned key
that all heads share. The projections from the latent to keys and values have been moved to the queries and
behind attention, so every head's key is the same c, and every head's value its first `rank` dimensions:

    score_{h,i}  = scale * q_{j,h} . c_i                        for i up to the position of query j
    weight_{h,i} = exp(score_{h,i}) / sum_i' exp(score_{h,i'})  in float32
    y_{j,h}      = sum_i weight_{h,i} * c_i[:rank]

Rows, positions and slots are those of paged_attention.py. Where the cache keeps 8 bits, c_i is the stored
vector times scale[slot].

`paged_latent_attention_ref` says this row by row; the kernels of paged_latent_decode.py and
paged_latent_prefill.py are held to it. `gathered_latent_attention` is the CPU path for rows of like shape:
heads and queries together are the rows of two ordinary products, since they all read the same vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphllm.kernels.gather_kv import gather_kv_cpu

# Of scores in a product: 16 MiB of float32, however long context and chunk are.
_MAX_SCORES = 4 * 1024**2


def paged_latent_attention_ref(
    query: Tensor,
    cache: Tensor,
    *,
    block_tables: Tensor,
    row_slots: Tensor,
    query_lens: Tensor,
    context_lens: Tensor,
    scale: float,
    rank: int,
    cache_scale: Tensor | None = None,
) -> Tensor:
    """The specification. Scores, softmax and sums in float32.

    query: [num_tokens, num_heads, width], rows one after the other; cache: [num_blocks, block_size, width];
    block_tables: [num_slots, max_blocks]; row_slots, query_lens, context_lens: [num_rows], rows without
    tokens allowed; cache_scale: [num_blocks, block_size], for caches in 8 bits. Returns [num_tokens,
    num_heads, rank] of query's dtype, zeros for tokens that belong to no row.
    """
    block_size = cache.shape[1]
    output, start = query.new_zeros(*query.shape[:2], rank), 0
    for row_slot, query_len, context_len in zip(
        row_slots.tolist(), query_lens.tolist(), context_lens.tolist(), strict=True
    ):
        positions = torch.arange(context_len, device=query.device)
        slots = block_tables[row_slot][positions // block_size].long(), positions % block_size
        latents = cache[slots].float()  # [context_len, width]
        if cache_scale is not None:
            latents = latents * cache_scale[slots][:, None]
        scores = torch.einsum("qhd,kd->hqk", query[start : start + query_len].float(), latents) * scale
        hidden = positions > positions[context_len - query_len :, None]  # [query_len, context_len] bool
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        attended = torch.einsum("hqk,kd->qhd", weights, latents[:, :rank])
        output[start : start + query_len] = attended.to(query.dtype)
        start += query_len
    return output


def gathered_latent_attention(
    query: Tensor,
    cache: Tensor,
    *,
    slots: Tensor,
    mask: Tensor | None,
    scale: float,
    scratch: Tensor,
    cache_scale: Tensor | None = None,
    gather_scratch: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """Attention of rows with the same number of queries over contexts padded to the same length.

    query: [num_rows, query_len, num_heads, width]; cache and cache_scale as above, contiguous; slots:
    [num_rows * max_context] int64, padding included, none of which may hold NaN. Of a row with one query,
    mask, [num_rows, 1, 1, max_context] of query's dtype or None, is added to the scores; several queries are
    the last of a row without padding, and see what comes before them. scratch: [num_rows * max_context,
    width], overwritten, of query's dtype for a cache in 8 bits and of the cache's else; gather_scratch: as
    `gather_kv_cpu` wants it. Writes out, [num_rows, query_len, num_heads, rank], and returns it.
    """
    num_rows, query_len, num_heads, width = query.shape
    gather_kv_cpu(
        cache[:, :, None],
        None if cache_scale is None else cache_scale[:, :, None],
        slots,
        out=scratch.view(-1, 1, width),
        scratch=gather_scratch,
    )
    latents = scratch.view(num_rows, -1, width).to(query.dtype)
    max_context = latents.shape[1]
    if query_len == 1:
        scores = torch.bmm(query[:, 0] * scale, latents.transpose(1, 2))  # [num_rows, num_heads, max_context]
        if mask is not None:
            scores += mask[:, 0]
        out[:, 0] = torch.bmm(scores.softmax(dim=-1), latents[..., : out.shape[-1]])
        return out
    assert num_rows == 1 and mask is None, "rows with several queries are not padded to each other's length"
    num_cached = max_context - query_len
    part_len = max(1, _MAX_SCORES // (num_heads * max_context))
    for first in range(0, query_len, part_len):
        part = query[0, first : first + part_len]  # [num_queries, num_heads, width]
        num_visible = num_cached + first + len(part)
        seen = latents[0, :num_visible]
        scores = (part.flatten(0, 1) * scale) @ seen.T
        scores = scores.view(len(part), num_heads, num_visible)
        positions = torch.arange(num_visible)
        hidden = positions > num_cached + first + torch.arange(len(part))[:, None]
        weights = scores.masked_fill_(hidden[:, None], -torch.inf).softmax(dim=-1)
        attended = weights.flatten(0, 1) @ seen[:, : out.shape[-1]]
        out[0, first : first + len(part)] = attended.view(len(part), num_heads, -1)
    return out
