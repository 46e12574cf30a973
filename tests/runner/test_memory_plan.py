"""From flags and shapes to blocks, and refusals that say what to change."""

from __future__ import annotations

import re

import pytest
import torch

from graphllm.cache.kv_cache import KVCacheShape
from graphllm.config import EngineConfig
from graphllm.errors import ConfigError
from graphllm.runner.memory_plan import MemoryPlan, free_host_bytes, plan_memory

SHAPE = KVCacheShape(num_layers=30, num_kv_heads=3, head_dim=64, block_size=16, dtype=torch.float32)
GIB = 1024**3


def plan(free_bytes: int = 16 * GIB, model_context: int = 8192, **flags: object) -> MemoryPlan:
    return plan_memory(
        EngineConfig(**flags),  # type: ignore[arg-type]
        SHAPE,
        model_context=model_context,
        free_bytes=free_bytes,
    )


def test_bytes_per_token_count_keys_and_values_of_all_layers() -> None:
    assert SHAPE.bytes_per_token == 2 * 30 * 3 * 64 * 4


def test_default_is_a_quarter_of_free_memory_up_to_four_gib() -> None:
    assert GIB * 0.99 < plan(free_bytes=4 * GIB).kv_cache_bytes <= GIB
    assert 4 * GIB * 0.99 < plan(free_bytes=64 * GIB).kv_cache_bytes <= 4 * GIB


def test_default_never_holds_less_than_one_full_sequence() -> None:
    small = plan(free_bytes=GIB)
    assert small.num_blocks == 8192 // 16 + 1


def test_asked_memory_is_what_is_taken() -> None:
    assert plan(kv_cache_memory_bytes=GIB).num_blocks == GIB // SHAPE.bytes_per_block


def test_blocks_that_no_slot_could_fill_are_not_allocated() -> None:
    assert plan(max_num_seqs=2, max_model_len=160).num_blocks == 2 * 10 + 1


def test_too_small_a_cache_is_refused_with_a_length_that_fits() -> None:
    with pytest.raises(ConfigError, match="lower --max-model-len to") as refusal:
        plan(kv_cache_memory_bytes=64 * 1024**2)
    fitting = int(re.search(r"--max-model-len to (\d+)", str(refusal.value))[1])  # type: ignore[index]
    assert plan(kv_cache_memory_bytes=64 * 1024**2, max_model_len=fitting).max_model_len == fitting


def test_more_than_is_free_is_refused() -> None:
    with pytest.raises(ConfigError, match="are free"):
        plan(free_bytes=GIB, kv_cache_memory_bytes=2 * GIB)
    with pytest.raises(ConfigError, match="are free"):
        plan(free_bytes=100 * 1024**2)


def test_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(ConfigError, match="8192 tokens"):
        plan(max_model_len=10_000)


def test_step_must_hold_a_token_of_every_sequence() -> None:
    with pytest.raises(ConfigError, match="--max-num-batched-tokens"):
        plan(max_num_seqs=64, max_num_batched_tokens=32)
    assert plan(max_num_seqs=512).max_num_batched_tokens == 512


def test_free_memory_is_measured() -> None:
    assert 0 < free_host_bytes() < 2**50
