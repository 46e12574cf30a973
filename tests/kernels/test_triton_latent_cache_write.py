"""The kernel that stores latents against its reference."""

from __future__ import annotations

import pytest
import torch

from graphllm.kernels.latent_cache_write import latent_cache_write, latent_cache_write_ref
from tests.kernels.device import DEVICE
from tests.kernels.latent_writes import LatentWrite

pytestmark = pytest.mark.triton

HAS_E4M3 = DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= (8, 9)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
WRITES = [
    LatentWrite(1, num_heads=128, rank=512, turned=64, plain=128, dtype=BF16, is_interleaved=True),
    LatentWrite(5, num_heads=20, rank=48, turned=24, plain=7, block_size=4, num_padding=2),
    LatentWrite(3, num_heads=3, rank=20, turned=2, dtype=F16, num_padding=1),
    LatentWrite(4, cache_dtype=torch.int8, is_interleaved=True, num_padding=1),
    LatentWrite(4, dtype=BF16, cache_dtype=torch.float8_e5m2),
    *([LatentWrite(4, rank=40, cache_dtype=torch.float8_e4m3fn, num_padding=1)] if HAS_E4M3 else []),
]


@pytest.mark.parametrize("write", WRITES, ids=str)
def test_kernel_leaves_what_its_reference_leaves(write: LatentWrite) -> None:
    found, expected = write.run(latent_cache_write), write.run(latent_cache_write_ref)
    cache_dtype = write.cache_dtype or write.dtype
    # Of the norm's roundings and the turn's each may be a truncation under the interpreter.
    roundings = {"absorbed": 2 * torch.finfo(write.dtype).eps, "scale": 4 * torch.finfo(write.dtype).eps}
    is_number = cache_dtype == torch.int8
    roundings["cache"] = 1 / 127 if is_number else 4 * torch.finfo(cache_dtype).eps
    for name, tensor in found.items():
        assert torch.equal(tensor.isnan(), expected[name].isnan()), name
        difference = (tensor - expected[name]).nan_to_num().abs()
        largest = expected[name].nan_to_num().abs().amax(-1, keepdim=True)
        assert (difference <= max(roundings[name], 4e-6) * largest).all(), name
