"""From flags and shapes to blocks, and refusals that say what to change."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from graphllm.cache.kv_cache import KVCacheShape
from graphllm.cache.kv_groups import group_layers
from graphllm.config import EngineConfig
from graphllm.errors import ConfigError
from graphllm.runner.memory_plan import (
    DeviceMemory,
    HostPlan,
    MemoryPlan,
    StepLimits,
    free_host_bytes,
    plan_device_memory,
    plan_host,
    plan_limits,
    plan_memory,
    plan_pinned_blocks,
)

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
    assert plan(max_num_seqs=2, max_model_len=160, enable_prefix_caching=False).num_blocks == 2 * 10 + 1


def test_the_prefix_cache_gets_as_much_again_and_more_where_memory_is_asked_for() -> None:
    assert plan(max_num_seqs=2, max_model_len=160).num_blocks == 2 * (2 * 10 + 1)
    asked = plan(max_num_seqs=2, max_model_len=160, kv_cache_memory_bytes=100 * SHAPE.bytes_per_block)
    assert asked.num_blocks == 100


def host_plan(device_type: str = "cpu", free_bytes: int = 64 * GIB, **flags: object) -> HostPlan:
    config = EngineConfig(**flags)  # type: ignore[arg-type]
    return plan_host(config, SHAPE, device_type=device_type, free_bytes=free_bytes)


def test_swap_space_is_four_gib_on_a_card_and_none_on_a_cpu_unless_asked_for() -> None:
    assert host_plan().num_blocks == 0
    assert host_plan("cuda").num_swap_blocks == 4 * GIB // SHAPE.bytes_per_block
    assert host_plan(swap_space=1.5).num_swap_blocks == 3 * GIB // 2 // SHAPE.bytes_per_block
    assert host_plan("cuda", swap_space=0.0).num_blocks == 0


def test_offloading_has_its_own_blocks_beside_the_swap_space() -> None:
    both = host_plan(swap_space=1.0, kv_offloading_size=2.0)
    assert both.num_cache_blocks == 2 * GIB // SHAPE.bytes_per_block
    assert both.num_blocks == both.num_swap_blocks + both.num_cache_blocks


def test_host_memory_that_is_not_there_is_refused_where_it_was_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"want 5\.00 GiB .* 4\.00 GiB are free: lower them"):
        host_plan(free_bytes=4 * GIB, swap_space=3.0, kv_offloading_size=2.0)
    with pytest.raises(ConfigError, match="--swap-space 1e-05 is less than one KV block"):
        host_plan(swap_space=1e-5)
    # A default never keeps a server from starting.
    assert host_plan("cuda", free_bytes=2 * GIB).num_swap_blocks == GIB // SHAPE.bytes_per_block
    assert host_plan("cuda", free_bytes=-GIB).num_blocks == 0


def test_pinned_prefixes_never_take_the_longest_sequences_room() -> None:
    def quota(num_blocks: int, **flags: object) -> int:
        asked = EngineConfig(
            max_model_len=160, kv_cache_memory_bytes=num_blocks * SHAPE.bytes_per_block, **flags
        )  # type: ignore[arg-type]
        planned = plan_memory(asked, SHAPE, model_context=8192, free_bytes=16 * GIB)
        return plan_pinned_blocks(asked, planned)

    assert quota(101) == 25
    assert quota(101, max_pinned_share=0.5) == 50
    assert quota(101, max_pinned_share=0.99) == 90
    assert quota(11) == 0


def test_too_small_a_cache_is_refused_with_a_length_that_fits() -> None:
    with pytest.raises(ConfigError, match="lower --max-model-len to") as refusal:
        plan(kv_cache_memory_bytes=64 * 1024**2)
    fitting = int(re.search(r"--max-model-len to at most (\d+)", str(refusal.value))[1])  # type: ignore[index]
    assert plan(kv_cache_memory_bytes=64 * 1024**2, max_model_len=fitting).max_model_len == fitting


def test_more_than_is_free_is_refused() -> None:
    with pytest.raises(ConfigError, match="are free"):
        plan(free_bytes=GIB, kv_cache_memory_bytes=2 * GIB)
    with pytest.raises(ConfigError, match=r"needs 0\.35 GiB and 0\.10 GiB are free") as refusal:
        plan(free_bytes=100 * 1024**2)
    fitting = int(re.search(r"--max-model-len to at most (\d+) tokens", str(refusal.value))[1])  # type: ignore[index]
    assert plan(free_bytes=100 * 1024**2, max_model_len=fitting).max_model_len == fitting


def test_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(ConfigError, match="8192 tokens"):
        plan(max_model_len=10_000)


def test_step_must_hold_a_token_of_every_sequence() -> None:
    with pytest.raises(ConfigError, match="--max-num-batched-tokens"):
        plan(max_num_seqs=64, max_num_batched_tokens=32)
    assert plan(max_num_seqs=512).max_num_batched_tokens == 512


def test_free_memory_is_measured() -> None:
    assert 0 < free_host_bytes() < 2**50


# -- an accelerator's memory -----------------------------------------------------------------------

LLAMA_8B = KVCacheShape(num_layers=32, num_kv_heads=8, head_dim=128, block_size=16, dtype=torch.bfloat16)
MEMORY = DeviceMemory(
    total_bytes=80 * GIB,
    free_bytes_at_start=79 * GIB,
    free_bytes_after_weights=64 * GIB,
    arena_bytes=GIB // 2,
    table_bytes=GIB // 4,
    graph_bytes=GIB // 4,
)


def limits_of(model_context: int = 131072, **flags: object) -> StepLimits:
    return plan_limits(
        EngineConfig(**flags),  # type: ignore[arg-type]
        model_context=model_context,
        device_type="cuda",
    )


def device_plan(memory: DeviceMemory = MEMORY, **flags: object) -> MemoryPlan:
    config = EngineConfig(**flags)  # type: ignore[arg-type]
    return plan_device_memory(config, LLAMA_8B, limits=limits_of(**flags), memory=memory)


def refusal_of(memory: DeviceMemory = MEMORY, **flags: object) -> str:
    with pytest.raises(ConfigError) as refusal:
        device_plan(memory, **flags)
    return refusal.value.message


def test_windows_let_longer_sequences_into_the_same_memory() -> None:
    windowed = dataclasses.replace(LLAMA_8B, kv_groups=group_layers([None, 1024] * 16, max_model_len=131072))
    config = EngineConfig(max_model_len=131072)
    plan = plan_device_memory(config, windowed, limits=limits_of(), memory=MEMORY)
    # 16 layers with everything; 16 with a window, a step of 2,048 tokens and a block at each end.
    assert plan.most_blocks_of_a_sequence == 131072 // 16 + (1024 + 2048) // 16 + 2
    assert plan.bytes_per_block == 16 * LLAMA_8B.bytes_per_token // 2
    assert plan.num_blocks // 2 == device_plan().num_blocks
    little = 9 * GIB
    kept = plan_device_memory(
        EngineConfig(kv_cache_memory_bytes=little), windowed, limits=limits_of(), memory=MEMORY
    )
    assert kept.num_blocks - 1 >= kept.most_blocks_of_a_sequence
    with pytest.raises(ConfigError, match=r"holds 73[0-9]{3} tokens, but one sequence of 131072"):
        plan_device_memory(
            EngineConfig(kv_cache_memory_bytes=little), LLAMA_8B, limits=limits_of(), memory=MEMORY
        )


def test_kv_cache_takes_what_utilization_leaves() -> None:
    # Of 72 GiB: 1 in use before, 15 of weights, 1 of step, tables and graphs.
    assert MEMORY.other_bytes == GIB
    assert MEMORY.weight_bytes == 15 * GIB
    assert MEMORY.kv_bytes(0.9) == pytest.approx(55 * GIB, abs=1)
    assert 0 <= 55 * GIB - device_plan().kv_cache_bytes < LLAMA_8B.bytes_per_block
    assert device_plan(gpu_memory_utilization=0.5).kv_cache_bytes == 23 * GIB


@pytest.mark.parametrize("part", ["arena_bytes", "table_bytes", "graph_bytes"])
def test_whatever_is_still_to_come_is_taken_off_the_cache(part: str) -> None:
    larger = dataclasses.replace(MEMORY, **{part: getattr(MEMORY, part) + 3 * GIB})
    assert device_plan(gpu_memory_utilization=0.5).kv_cache_bytes == 23 * GIB
    assert device_plan(larger, gpu_memory_utilization=0.5).kv_cache_bytes == 20 * GIB


def test_what_others_use_is_taken_off_the_cache() -> None:
    crowded = dataclasses.replace(MEMORY, free_bytes_at_start=69 * GIB, free_bytes_after_weights=54 * GIB)
    assert device_plan(gpu_memory_utilization=0.75).kv_cache_bytes == 43 * GIB
    assert device_plan(crowded, gpu_memory_utilization=0.75).kv_cache_bytes == 33 * GIB


def test_asked_memory_goes_before_utilization() -> None:
    for utilization in (0.1, 0.9):
        plan = device_plan(kv_cache_memory_bytes=20 * GIB, gpu_memory_utilization=utilization)
        assert plan.kv_cache_bytes == 20 * GIB


def test_asked_memory_beyond_the_device_is_refused_with_the_most_there_is() -> None:
    message = refusal_of(kv_cache_memory_bytes=64 * GIB)
    assert "(64.00 GiB) is more than is left" in message
    most = int(re.search(r"Lower it to at most (\d+)", message)[1])  # type: ignore[index]
    assert most == MEMORY.most_kv_bytes == 63 * GIB
    assert device_plan(kv_cache_memory_bytes=most).kv_cache_bytes == most


def test_asked_memory_below_one_sequence_is_refused_with_both_ways_out() -> None:
    message = refusal_of(kv_cache_memory_bytes=GIB)
    assert "holds 8176 tokens, but one sequence of 131072 needs 16.00 GiB" in message
    least = int(re.search(r"raise it to at least (\d+)", message)[1])  # type: ignore[index]
    assert device_plan(kv_cache_memory_bytes=least).num_blocks == 131072 // 16 + 1
    assert "lower --max-model-len to at most 8176" in message
    assert device_plan(kv_cache_memory_bytes=GIB, max_model_len=8176).num_blocks == GIB // (16 * 128 * 1024)


def test_device_blocks_that_no_sequence_could_fill_are_not_allocated() -> None:
    few = {"max_num_seqs": 2, "max_model_len": 160}
    assert device_plan(**few, enable_prefix_caching=False).num_blocks == 2 * 10 + 1
    # A prefix cache has a use for all that is left.
    assert device_plan(**few).num_blocks > 10_000


CRAMPED = dataclasses.replace(
    MEMORY, total_bytes=24 * GIB, free_bytes_at_start=23 * GIB, free_bytes_after_weights=8 * GIB
)


def test_out_of_memory_says_where_it_went_and_each_way_out_works() -> None:
    message = refusal_of(CRAMPED, max_model_len=40000)
    assert "one sequence of 40000 tokens needs a KV cache of 4.88 GiB" in message
    assert "--gpu-memory-utilization 0.9 leaves 4.60 GiB" in message
    assert "of 24.00 GiB, 15.00 GiB are weights, 0.50 GiB the largest step's" in message
    assert "0.25 GiB slot tables and logits, 0.25 GiB graphs, 1.00 GiB were in use before" in message
    assert "0.28 GiB are missing" in message
    shorter, step_tokens, share = re.search(  # type: ignore[union-attr]
        r"lower --max-model-len to at most (\d+) \(\d+ tokens fewer\); "
        r"or lower --max-num-batched-tokens to about (\d+); "
        r"or raise --gpu-memory-utilization to at least ([\d.]+)\.$",
        message,
    ).groups()
    assert device_plan(CRAMPED, max_model_len=int(shorter)).max_model_len == 37664
    with pytest.raises(ConfigError):
        device_plan(CRAMPED, max_model_len=int(shorter) + 17)
    assert device_plan(CRAMPED, max_model_len=40000, gpu_memory_utilization=float(share)).num_blocks
    smaller = dataclasses.replace(CRAMPED, arena_bytes=GIB // 2 * int(step_tokens) // 2048)
    assert device_plan(smaller, max_model_len=40000, max_num_batched_tokens=int(step_tokens)).num_blocks


def test_utilization_is_not_advised_beyond_what_a_device_can_give() -> None:
    message = refusal_of(CRAMPED, max_model_len=131072)
    assert "--gpu-memory-utilization to" not in message
    assert "lower --max-model-len to at most 37664" in message


def test_weights_that_leave_nothing_are_said_to_be_too_large() -> None:
    full = dataclasses.replace(CRAMPED, free_bytes_after_weights=GIB)
    message = refusal_of(full)
    assert "leaves 0.00 GiB" in message
    assert message.endswith("more than any flag can give: take a smaller model or a larger device.")


def test_a_step_on_cuda_takes_2048_tokens_unless_more_sequences_run() -> None:
    assert limits_of().max_num_batched_tokens == 2048
    assert limits_of(max_num_seqs=4096).max_num_batched_tokens == 4096
    assert limits_of(max_num_batched_tokens=64).max_num_batched_tokens == 64
    assert plan().max_num_batched_tokens == 256


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_8_bit_caches_count_their_scales(dtype: torch.dtype) -> None:
    small = dataclasses.replace(LLAMA_8B, dtype=dtype)
    assert small.has_scales
    assert not LLAMA_8B.has_scales
    assert small.bytes_per_token == LLAMA_8B.bytes_per_token // 2 + 32 * 2 * 8 * 4
    assert small.bytes_per_block == 16 * small.bytes_per_token
