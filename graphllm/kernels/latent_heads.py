"""Heads from latents (multi-head latent attention, DeepSeek-AI, 2024, arXiv:2405.04434), spelled out.

    query_h = (turned part of q_h, plain part of q_h)
    key_h   = (the turned key that all heads share, plain part of kv_h)
    value_h = (value part of kv_h, 0 ...)

so that all three have head_dim = turned + plain dimensions, what turns comes first, and a cache of ordinary
heads holds them. `leading_dimensions` takes the values' own dimensions out of what attention makes of them.

Owns this order of dimensions. The turn is `rotary_cache_write.py`'s.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
)

_NUM_WARPS = 2


def latent_heads_ref(query: Tensor, key_value: Tensor, shared_key: Tensor, *, out: Tensor) -> Tensor:
    """query: [num_tokens, num_heads, head_dim], plain dimensions first. key_value: [num_tokens, num_heads,
    plain + value_dim], the keys' plain dimensions first. shared_key: [num_tokens, turned], any stride between
    tokens. Writes out: [num_tokens, 3 * num_heads, head_dim], queries, keys, values, and returns it.

    value_dim is at most head_dim.
    """
    num_heads, head_dim = query.shape[1:]
    num_turned = shared_key.shape[1]
    num_plain = head_dim - num_turned
    queries, keys, values = out.split(num_heads, dim=1)
    queries[..., :num_turned] = query[..., num_plain:]
    queries[..., num_turned:] = query[..., :num_plain]
    keys[..., :num_turned] = shared_key[:, None]
    keys[..., num_turned:] = key_value[..., :num_plain]
    value_dim = key_value.shape[2] - num_plain
    values[..., :value_dim] = key_value[..., num_plain:]
    values[..., value_dim:] = 0.0
    return out


@triton.jit(do_not_specialize=["shared_stride"])
def _latent_heads_kernel(
    query,  # [num_tokens, NUM_HEADS, TURNED + PLAIN]
    key_value,  # [num_tokens, NUM_HEADS, PLAIN + VALUE_DIM]
    shared_key,  # [num_tokens, TURNED], shared_stride between tokens
    out,  # [num_tokens, 3 * NUM_HEADS, TURNED + PLAIN]
    shared_stride,
    NUM_HEADS: tl.constexpr,
    TURNED: tl.constexpr,
    PLAIN: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    release_successor(PDL)
    HEAD_DIM: tl.constexpr = TURNED + PLAIN
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, PADDED)
    in_head = dims < HEAD_DIM
    is_turned = dims < TURNED
    query_at = query + (token * NUM_HEADS + head) * HEAD_DIM
    key_value_at = key_value + (token * NUM_HEADS + head) * (PLAIN + VALUE_DIM)
    queries = tl.load(query_at + tl.where(is_turned, dims + PLAIN, dims - TURNED), mask=in_head, other=0.0)
    shared = tl.load(shared_key + token * shared_stride + dims, mask=is_turned, other=0.0)
    plain = tl.load(key_value_at + dims - TURNED, mask=in_head & (dims >= TURNED), other=0.0)
    values = tl.load(key_value_at + PLAIN + dims, mask=dims < VALUE_DIM, other=0.0)
    out_at = out + (token * (3 * NUM_HEADS) + head) * HEAD_DIM + dims
    tl.store(out_at, queries, mask=in_head)
    tl.store(out_at + NUM_HEADS * HEAD_DIM, tl.where(is_turned, shared, plain), mask=in_head)
    tl.store(out_at + 2 * NUM_HEADS * HEAD_DIM, values, mask=in_head)


def latent_heads(query: Tensor, key_value: Tensor, shared_key: Tensor, *, out: Tensor) -> Tensor:
    """See `latent_heads_ref`. The kernel needs all but shared_key contiguous."""
    if not runs_triton(query):
        return latent_heads_ref(query, key_value, shared_key, out=out)
    num_tokens, num_heads, head_dim = query.shape
    num_turned = shared_key.shape[1]
    num_plain = head_dim - num_turned
    value_dim = key_value.shape[2] - num_plain
    assert 0 < value_dim <= head_dim and out.shape == (num_tokens, 3 * num_heads, head_dim)
    assert query.is_contiguous() and key_value.is_contiguous() and out.is_contiguous()
    assert shared_key.stride(1) == 1 and query.dtype == key_value.dtype == shared_key.dtype == out.dtype
    _latent_heads_kernel[(num_tokens, num_heads)](
        query,
        key_value,
        shared_key,
        out,
        shared_key.stride(0),
        NUM_HEADS=num_heads,
        TURNED=num_turned,
        PLAIN=num_plain,
        VALUE_DIM=value_dim,
        PADDED=triton.next_power_of_2(head_dim),
        num_warps=_NUM_WARPS,
        **launch_options(query.device),
    )
    return out


def leading_dimensions_ref(x: Tensor, *, out: Tensor) -> Tensor:
    """x: [num_tokens, num_heads, head_dim]; writes the first dimensions of each head into out: [num_tokens,
    num_heads, any number up to head_dim], and returns it."""
    return out.copy_(x[..., : out.shape[2]])


@triton.jit
def _leading_dimensions_kernel(
    x,  # [num_tokens, num_heads, HEAD_DIM]
    out,  # [num_tokens, num_heads, KEPT]
    HEAD_DIM: tl.constexpr,
    KEPT: tl.constexpr,
    PADDED: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    release_successor(PDL)
    head = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dims = tl.arange(0, PADDED)
    is_kept = dims < KEPT
    values = tl.load(x + head * HEAD_DIM + dims, mask=is_kept, other=0.0)
    tl.store(out + head * KEPT + dims, values, mask=is_kept)


def leading_dimensions(x: Tensor, *, out: Tensor) -> Tensor:
    """See `leading_dimensions_ref`. The kernel needs both contiguous."""
    if not runs_triton(x):
        return leading_dimensions_ref(x, out=out)
    num_tokens, num_heads, head_dim = x.shape
    num_kept = out.shape[2]
    assert out.shape[:2] == x.shape[:2] and num_kept <= head_dim and out.dtype == x.dtype
    assert x.is_contiguous() and out.is_contiguous()
    _leading_dimensions_kernel[(num_tokens, num_heads)](
        x,
        out,
        HEAD_DIM=head_dim,
        KEPT=num_kept,
        PADDED=triton.next_power_of_2(num_kept),
        num_warps=_NUM_WARPS,
        **launch_options(x.device),
    )
    return out
