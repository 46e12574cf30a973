"""Latents into their slots and queries turned, as it is specified."""

from __future__ import annotations

import pytest
import torch

from graphllm.kernels.latent_cache_write import latent_cache_write_ref
from graphllm.kernels.rms_norm import rms_norm_ref
from graphllm.kernels.rotary import rotary_ref
from tests.kernels.device import DEVICE
from tests.kernels.latent_writes import EIGHT_BITS, LatentWrite

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="references are the CPU's")


def expected_vectors(write: LatentWrite) -> torch.Tensor:
    """Each token's normalized latent and turned key: [num_tokens, rank + turned]."""
    latent, key = write.arguments["latents"].split((write.rank, write.turned), dim=1)
    normed = rms_norm_ref(latent, write.arguments["norm_weight"], eps=1e-3)
    turned = key[:, None].clone()
    rotary_ref(turned, write.arguments["tables"], is_interleaved=write.is_interleaved)
    return torch.cat((normed, turned[:, 0]), dim=1)


@pytest.mark.parametrize("is_interleaved", [False, True])
def test_a_slot_has_the_normalized_latent_and_the_turned_key(is_interleaved: bool) -> None:
    write = LatentWrite(20, is_interleaved=is_interleaved, num_padding=2)
    slots = write.arguments["slot_mapping"][:18]
    cache = write.run(latent_cache_write_ref)["cache"].flatten(0, 1)
    assert torch.equal(cache[slots], expected_vectors(write)[:18])
    is_other = torch.ones(len(cache), dtype=torch.bool)
    is_other[slots] = False
    assert cache[is_other].isnan().all()


def test_only_the_turned_dimensions_of_queries_are_written() -> None:
    write = LatentWrite(3, is_interleaved=True)
    absorbed = write.run(latent_cache_write_ref)["absorbed"]
    assert absorbed[..., : write.rank].isnan().all()
    turned = write.arguments["query"][..., write.plain :].clone()
    rotary_ref(turned, write.arguments["tables"], is_interleaved=True)
    assert torch.equal(absorbed[..., write.rank :], turned)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_in_8_bits_a_token_has_one_scale(dtype: torch.dtype) -> None:
    write = LatentWrite(6, cache_dtype=dtype)
    left, expected = write.run(latent_cache_write_ref), expected_vectors(write)
    slots = write.arguments["slot_mapping"]
    largest = {torch.int8: 127, torch.float8_e5m2: 57344, torch.float8_e4m3fn: 448}[dtype]
    bounds = expected.abs().amax(1)
    torch.testing.assert_close(left["scale"].flatten()[slots], bounds / largest)
    step = 0.51 / 127 if dtype == torch.int8 else 2.0**-3
    difference = (left["cache"].flatten(0, 1)[slots] - expected).abs()
    assert (difference <= step * bounds[:, None]).all()


def test_a_slot_outside_the_cache_is_an_error() -> None:
    write = LatentWrite(2)
    write.arguments["slot_mapping"][1] = 10**6
    with pytest.raises(IndexError):
        write.run(latent_cache_write_ref)
