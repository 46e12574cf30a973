"""The kernels of attention over latents against their reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.attention_batch import assert_attended, pairwise
from tests.kernels.device import DEVICE
from tests.kernels.latent_batch import attend, latent_batch

pytestmark = pytest.mark.triton

HAS_E4M3 = DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= (8, 9)
E4M3 = [torch.float8_e4m3fn] if HAS_E4M3 else []
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
AXES: dict[str, list[Any]] = {
    # Fewer than a tile, as many as several queries of a tile leave room for, more than a tile.
    "num_heads": [1, 3, 16, 20, 40],
    # Powers of two, and numbers that need padding.
    "sizes": [(32, 16), (48, 8), (20, 24)],
    "block_size": [16, 64],
    "dtype": [F32, BF16, F16],
    "cache_dtype": [None, torch.int8, torch.float8_e5m2, *E4M3],
}


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


@pytest.mark.parametrize("case", list(pairwise(AXES)), ids=name_of)
def test_a_mixture_of_rows_equals_the_reference(case: dict[str, Any]) -> None:
    """Decode rows of which one is cut, prefill rows from their start and behind a context."""
    rank, turned = case["sizes"]
    batch = latent_batch(
        [(1, 100), (1, 1), (0, 0), (9, 37), (2, 2), (1, case["block_size"])],
        num_heads=case["num_heads"],
        rank=rank,
        turned=turned,
        block_size=case["block_size"],
        dtype=case["dtype"],
        cache_dtype=case["cache_dtype"],
    )
    assert_attended(attend(batch), batch.expected())


@pytest.mark.parametrize("num_heads", [16, 128])
def test_sizes_of_real_models(num_heads: int) -> None:
    """DeepSeek-V2-Lite's and V3's heads over a latent of 512 and a shared key of 64 dimensions."""
    batch = latent_batch([(1, 70), (3, 40)], num_heads=num_heads, rank=512, turned=64, dtype=BF16)
    assert_attended(attend(batch, num_programs=2), batch.expected())


def test_rows_of_the_other_kind_and_padding_are_left_alone() -> None:
    batch = latent_batch([(1, 30), (3, 9)], num_padding_tokens=2)
    decoded, prefilled = attend(batch, prefill=False), attend(batch, decode=False)
    assert not decoded[0].isnan().any() and decoded[1:].isnan().all()
    assert not prefilled[1:4].isnan().any() and prefilled[[0, 4, 5]].isnan().all()
    expected = batch.expected()
    assert_attended(decoded[:1], expected[:1])
    assert_attended(prefilled[1:4], expected[1:4])
