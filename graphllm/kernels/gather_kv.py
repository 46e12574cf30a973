"""Gather slots of a KV cache into contiguous memory, as numbers to compute with; for the CPU.

    out[i] = cache[slots[i]]                                 a cache in 16 or 32 bits
    out[i, g] = cache[slots[i], g] * scale[slots[i], g]      a cache in 8 bits, for each KV head g

`gather_kv_ref` says so. torch converts e4m3 to float32 ten times slower than attention reads it, so
`gather_kv_cpu` shifts the bits instead: an 8-bit float's exponent and mantissa are those of a float16 whose
exponent has another bias, subnormal numbers included, and the bias goes into the scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphllm.kernels.kv_quantization import dequantize_kv_ref

# Where a float's 7 lower bits go within float16, and what the other bias of the exponent is worth.
_SHIFTS = {torch.float8_e4m3fn: (7, 2.0**8), torch.float8_e5m2: (8, 1.0)}
_WITHOUT_COPIED_SIGN = -0x4001  # the sign is extended on the way from 8 bits to 16


def gather_kv_ref(cache: Tensor, scale: Tensor | None, slots: Tensor, *, out: Tensor) -> Tensor:
    """The specification.

    cache: [num_blocks, block_size, num_kv_heads, head_dim]; scale: [num_blocks, block_size, num_kv_heads]
    float32 for a cache in 8 bits, else None; slots: [num_slots] int64, block * block_size + offset; out:
    [num_slots, num_kv_heads, head_dim] of any floating dtype, returned.
    """
    stored = cache.flatten(0, 1)[slots]
    if scale is None:
        return out.copy_(stored)
    return out.copy_(dequantize_kv_ref(stored, scale.flatten(0, 1)[slots]))


def gather_scratch_bytes(num_slots: int, num_kv_heads: int, head_dim: int) -> int:
    """Bytes of scratch memory that `gather_kv_cpu` needs for a cache in 8 bits."""
    return num_slots * num_kv_heads * (4 + 3 * head_dim)


def gather_kv_cpu(
    cache: Tensor, scale: Tensor | None, slots: Tensor, *, out: Tensor, scratch: Tensor | None
) -> Tensor:
    """See `gather_kv_ref`. NaN and infinity are no numbers that a cache in 8 bits stores.

    cache, scale and out contiguous; a cache without scales in out's dtype. scratch: flat uint8, of at least
    `gather_scratch_bytes`, overwritten; None where there are no scales.
    """
    num_slots, num_kv_heads, head_dim = out.shape
    width = num_kv_heads * head_dim
    if scale is None:
        return torch.index_select(cache.view(-1, num_kv_heads, head_dim), 0, slots, out=out)
    assert scratch is not None, "a cache in 8 bits is gathered by way of scratch memory"
    num_scales, num_elements = num_slots * num_kv_heads, num_slots * width
    scales = scratch[: 4 * num_scales].view(torch.float32).view(num_slots, num_kv_heads)
    halves = scratch[4 * num_scales : 4 * num_scales + 2 * num_elements].view(torch.int16)
    stored = scratch[4 * num_scales + 2 * num_elements :][:num_elements].view(torch.int8)
    torch.index_select(scale.view(-1, num_kv_heads), 0, slots, out=scales)
    # As integers, which torch can gather whatever they mean.
    torch.index_select(cache.view(torch.int8).view(-1, width), 0, slots, out=stored.view(num_slots, width))
    flat = out.view(-1)
    if cache.dtype in _SHIFTS:
        shift, bias = _SHIFTS[cache.dtype]
        halves.copy_(stored).mul_(1 << shift)
        if shift < 8:
            halves.bitwise_and_(_WITHOUT_COPIED_SIGN)
        flat.copy_(halves.view(torch.float16))
        scales.mul_(bias)
    else:
        flat.copy_(stored)
    return out.mul_(scales[..., None])
