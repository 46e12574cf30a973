"""Gathering a cache for attention on the CPU: the fast way against the specification."""

from __future__ import annotations

import pytest
import torch

from graphllm.kernels.gather_kv import gather_kv_cpu, gather_kv_ref, gather_scratch_bytes
from graphllm.kernels.kv_quantization import LARGEST_STORED


@pytest.mark.parametrize("dtype", LARGEST_STORED)
def test_every_number_of_an_8_bit_format_is_read_exactly(dtype: torch.dtype) -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).view(dtype)
    numbers = every_byte[every_byte.float().isfinite()]
    cache = torch.zeros(1, len(numbers), 1, 1, dtype=torch.uint8).view(dtype)
    cache.view(torch.uint8)[0, :, 0, 0] = numbers.view(torch.uint8)
    scale = torch.full((1, len(numbers), 1), 0.5)
    slots = torch.arange(len(numbers))
    out = torch.full((len(numbers), 1, 1), torch.nan)
    scratch = torch.empty(gather_scratch_bytes(len(numbers), 1, 1), dtype=torch.uint8)
    gather_kv_cpu(cache, scale, slots, out=out, scratch=scratch)
    assert torch.equal(out.view(-1), numbers.float() * 0.5)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", LARGEST_STORED)
def test_slots_and_heads_get_their_own_scales(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # Finite in each of the formats, whatever it means there.
    stored = torch.randint(-120, 120, (3, 4, 2, 6), generator=generator, dtype=torch.int8)
    cache, scale = stored.view(dtype), torch.rand(3, 4, 2, generator=generator)
    slots = torch.tensor([11, 4, 4, 7, 0])
    scratch = torch.full((gather_scratch_bytes(5, 2, 6) + 9,), 255, dtype=torch.uint8)
    out = gather_kv_cpu(cache, scale, slots, out=torch.empty(5, 2, 6, dtype=out_dtype), scratch=scratch)
    expected = gather_kv_ref(cache, scale, slots, out=torch.empty(5, 2, 6))
    tolerance = 1e-6 if out_dtype == torch.float32 else 2**-7
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=0.0)
    assert (scratch[-9:] == 255).all(), "more scratch memory was used than is asked for"


def test_a_cache_without_scales_is_copied() -> None:
    cache = torch.randn(3, 4, 2, 6, dtype=torch.bfloat16)
    slots = torch.tensor([11, 0, 5])
    out = gather_kv_cpu(cache, None, slots, out=torch.empty(3, 2, 6, dtype=torch.bfloat16), scratch=None)
    assert torch.equal(out, cache.flatten(0, 1)[slots])
    assert torch.equal(out, gather_kv_ref(cache, None, slots, out=torch.empty_like(out)))
