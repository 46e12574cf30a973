"""What a mixture of experts adds to a token: its experts' results, and what the shared experts say.

    z_t = sum_i y_{t,i} + sigmoid(g_t) * s_t          s_t the shared experts' result, g_t its gate's logit

The sum runs in the order of the token's choices, in float32, and is rounded once, so it is the same whatever
the order in which experts were computed. Padding tokens have no results: theirs is the shared part alone.

Owns this sum and nothing before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
    widen,
)

_TILE = 1024
_NUM_WARPS = 4


@dataclass(frozen=True, slots=True)
class SharedPart:
    """output: [num_tokens, hidden], what the shared experts say. gate_logits: [num_tokens, num_logits]
    float32, whose last column is the gate's; None where there is no gate."""

    output: Tensor
    gate_logits: Tensor | None


def moe_sum_ref(results: Tensor, experts: Tensor, shared: SharedPart | None, *, out: Tensor) -> Tensor:
    """results: [num_tokens * top_k, hidden], of padding anything; experts: [num_tokens, top_k] int32, -1 for
    padding. Writes out: [num_tokens, hidden] of the same dtype, and returns it; it may be the shared output.
    """
    by_token = results.view(*experts.shape, -1).masked_fill((experts < 0)[:, :, None], 0.0)
    sums = by_token.sum(1, dtype=torch.float32)
    if shared is not None:
        sums += shared_part_ref(shared)
    return out.copy_(sums)


def shared_part_ref(shared: SharedPart) -> Tensor:
    """sigmoid(g_t) * s_t in float32."""
    if shared.gate_logits is None:
        return shared.output.float()
    return shared.output.float() * shared.gate_logits[:, -1:].sigmoid()


@triton.jit
def load_shared(
    shared,
    gate_logits,
    token,
    columns,
    mask,
    num_logits,
    HIDDEN: tl.constexpr,
    HAS_GATE: tl.constexpr,
):
    """The shared part of one token's `columns`, float32."""
    values = widen(tl.load(shared + token * HIDDEN + columns, mask=mask, other=0.0))
    if HAS_GATE:
        values /= 1.0 + tl.exp(-tl.load(gate_logits + token * num_logits + num_logits - 1))
    return values


def shared_arguments(shared: SharedPart | None, out: Tensor) -> tuple[Tensor, Tensor, int]:
    """Pointers and the width of the logits for a kernel that may call `load_shared`."""
    if shared is None:
        return out, out, 1
    assert shared.output.is_contiguous() and shared.output.shape == out.shape
    if shared.gate_logits is None:
        return shared.output, shared.output, 1
    assert shared.gate_logits.is_contiguous() and shared.gate_logits.dtype == torch.float32
    return shared.output, shared.gate_logits, shared.gate_logits.shape[1]


@triton.jit(do_not_specialize=["num_logits"])
def _moe_sum_kernel(
    results,  # [num_tokens * TOP_K, HIDDEN]
    experts,  # [num_tokens, TOP_K] int32
    shared,  # [num_tokens, HIDDEN] where HAS_SHARED
    gate_logits,  # [num_tokens, num_logits] float32 where HAS_GATE
    out,  # [num_tokens, HIDDEN]
    num_logits,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    HAS_GATE: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    release_successor(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    in_row = columns < HIDDEN
    sums = tl.zeros((TILE,), tl.float32)
    for rank in tl.static_range(TOP_K):
        end = tl.where(tl.load(experts + token * TOP_K + rank) < 0, 0, HIDDEN)
        at = results + (token * TOP_K + rank) * HIDDEN + columns
        sums += widen(tl.load(at, mask=columns < end, other=0.0))
    if HAS_SHARED:
        sums += load_shared(shared, gate_logits, token, columns, in_row, num_logits, HIDDEN, HAS_GATE)
    tl.store(out + token * HIDDEN + columns, sums.to(out.dtype.element_ty), mask=in_row)


def moe_sum(results: Tensor, experts: Tensor, shared: SharedPart | None, *, out: Tensor) -> Tensor:
    """See `moe_sum_ref`. The kernel needs all tensors contiguous."""
    if not runs_triton(results):
        return moe_sum_ref(results, experts, shared, out=out)
    num_tokens, hidden = out.shape
    assert results.shape == (experts.numel(), hidden) and results.dtype == out.dtype
    assert results.is_contiguous() and experts.is_contiguous() and out.is_contiguous()
    output, gate_logits, num_logits = shared_arguments(shared, out)
    _moe_sum_kernel[(num_tokens, triton.cdiv(hidden, _TILE))](
        results,
        experts,
        output,
        gate_logits,
        out,
        num_logits,
        HIDDEN=hidden,
        TOP_K=experts.shape[1],
        HAS_SHARED=shared is not None,
        HAS_GATE=shared is not None and shared.gate_logits is not None,
        TILE=_TILE,
        num_warps=_NUM_WARPS,
        **launch_options(results.device),
    )
    return out
