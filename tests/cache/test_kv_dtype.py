"""Which number format the KV cache gets, and what is refused rather than guessed."""

from __future__ import annotations

import pytest
import torch

from graphllm.cache.kv_cache import KVCache, KVCacheShape, resolve_kv_dtype
from graphllm.errors import ConfigError
from graphllm.kernels.kv_quantization import LARGEST_STORED


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("auto", torch.bfloat16),
        ("float32", torch.float32),
        ("fp8", torch.float8_e4m3fn),
        ("fp8_e4m3", torch.float8_e4m3fn),
        ("fp8_e5m2", torch.float8_e5m2),
        ("int8", torch.int8),
    ],
)
def test_a_format_is_the_models_unless_it_is_named(name: str, dtype: torch.dtype) -> None:
    assert resolve_kv_dtype(name, torch.bfloat16) == dtype


@pytest.mark.parametrize("name", ["fp8", "fp8_e4m3", "fp8_e5m2"])
def test_8_bit_floats_are_refused_on_cards_that_have_none_and_int8_is_offered(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--kv-cache-dtype {name}: .* 8.6, .* 8.9; int8"):
        resolve_kv_dtype(name, torch.bfloat16, capability=(8, 6))
    assert resolve_kv_dtype(name, torch.bfloat16, capability=(8, 9)).itemsize == 1
    assert resolve_kv_dtype("int8", torch.bfloat16, capability=(8, 0)) == torch.int8


def test_on_a_card_wide_formats_are_the_models() -> None:
    assert resolve_kv_dtype("bfloat16", torch.bfloat16, capability=(9, 0)) == torch.bfloat16
    with pytest.raises(ConfigError, match=r"the model's bfloat16 or in 8 bits; .*--dtype float16"):
        resolve_kv_dtype("float16", torch.bfloat16, capability=(9, 0))


@pytest.mark.parametrize("dtype", LARGEST_STORED)
def test_8_bit_pools_have_a_scale_for_each_token_and_head_and_are_counted(dtype: torch.dtype) -> None:
    shape = KVCacheShape(num_layers=2, num_kv_heads=3, head_dim=8, block_size=4, dtype=dtype)
    cache = KVCache(shape, 5, device=torch.device("cpu"))
    for layer in cache.layers:
        for scale in (layer.key_scale, layer.value_scale):
            assert scale is not None and scale.shape == (5, 4, 3) and scale.dtype == torch.float32
    assert sum(pool.nbytes for pool in cache.pools.pools) == 5 * shape.bytes_per_block
