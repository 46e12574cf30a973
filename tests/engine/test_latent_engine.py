"""A model whose cache holds latents, through the whole engine: shared, copied, moved, and counted."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from graphllm.cache.kv_cache import LayerLatents
from graphllm.engine.engine import Engine
from graphllm.runner.device import CpuDevice, InlineDevice
from graphllm.sampling_params import SamplingParams
from tests.engine.harness import add, assert_nothing_held, ended, running_engine, settle
from tests.engine.test_memory_tiers import generated, metric
from tests.latent_model import LAYERS, WIDTH, write_latent_model

BLOCK_SIZE = 8
OUTPUT_TOKENS = 40
GREEDY = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
FLAGS: dict[str, Any] = {
    "block_size": BLOCK_SIZE,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 24,
    "max_model_len": 80,
    "debug_kv": True,
}
BLOCK_BYTES = BLOCK_SIZE * LAYERS * WIDTH * 4
# KV for two of six sequences of 20 and 40 tokens, and the null block.
PRESSED: dict[str, Any] = {**FLAGS, "kv_cache_memory_bytes": 17 * BLOCK_BYTES, "swap_space": 0.001}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latent_model(tmp_path_factory.mktemp("latent") / "model")


def prompts(count: int = 6) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(256) for _ in range(20)] for _ in range(count)]


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[list[int]]]:
    """transformers' tokens, whose two best logits stay apart (asserted)."""
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokens = []
    for prompt in prompts():
        token_ids = list(prompt)
        for _ in range(OUTPUT_TOKENS):
            with torch.inference_mode():
                best = theirs(torch.tensor([token_ids])).logits[0, -1].topk(2)
            assert best.values[0] - best.values[1] > 1e-3, "a near tie, which proves nothing"
            token_ids.append(int(best.indices[0]))
        tokens.append([token_ids[len(prompt) :]])
    return tokens


def test_a_token_takes_its_latent_and_the_shared_key_once(model: Path) -> None:
    async def scenario() -> None:
        async with running_engine(model, **FLAGS) as engine:
            cache = engine._loaded.model.runner.kv_cache
            assert cache.shape.bytes_per_token == LAYERS * WIDTH * 4
            held = sum(pool[1:].nbytes for pool in cache.pools.pools)
            num_tokens = BLOCK_SIZE * engine._loaded.model.scheduler.block_manager.num_usable_blocks
            assert held == num_tokens * LAYERS * WIDTH * 4
            assert all(isinstance(layer, LayerLatents) for layer in cache.layers)

    asyncio.run(scenario())


@pytest.mark.parametrize("device", [InlineDevice, lambda: CpuDevice(1)], ids=["inline", "cpu"])
def test_sequences_that_are_swapped_give_transformers_tokens(
    model: Path, expected: list[list[list[int]]], device: type
) -> None:
    async def scenario() -> None:
        async with running_engine(model, device=device(), **PRESSED) as engine:
            assert await generated(engine, prompts(), GREEDY) == expected
            assert metric(engine, "swap_in_blocks_total") > 0
            num_bytes = metric(engine, "swap_in_bytes_total")
            assert num_bytes == metric(engine, "swap_in_blocks_total") * BLOCK_BYTES
            assert_nothing_held(engine)
            engine._loaded.model.scheduler.check(full=True)

    asyncio.run(scenario())


@torch.inference_mode()
def fill_unused_with_nan(engine: Engine) -> None:
    for pool in engine._loaded.model.runner.kv_cache.pools.pools:
        pool[1:] = torch.nan


def test_what_unused_slots_hold_never_matters(model: Path, expected: list[list[list[int]]]) -> None:
    async def scenario() -> None:
        async with running_engine(model, **FLAGS) as engine:
            fill_unused_with_nan(engine)
            assert await generated(engine, prompts(), GREEDY) == expected

    asyncio.run(scenario())


def test_a_prefix_seen_before_is_not_computed_and_changes_no_token(
    model: Path, expected: list[list[list[int]]]
) -> None:
    async def scenario() -> None:
        async with running_engine(model, **FLAGS) as engine:
            for turn in range(2):
                request = add(engine, f"r{turn}", prompts()[0], GREEDY)
                await ended(request)
                assert request.token_ids == expected[0]
                assert request.num_cached_tokens == (16 if turn else 0)
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(scenario())


def test_siblings_write_to_copies_of_the_block_they_share(
    model: Path, expected: list[list[list[int]]]
) -> None:
    """20 tokens are two blocks and a half: greedy siblings share all three and go on in their own."""

    async def scenario() -> None:
        async with running_engine(model, **FLAGS) as engine:
            params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True, n=3)
            request = add(engine, "r", prompts()[1], params)
            await ended(request)
            await settle(engine)
            assert request.token_ids == expected[1] * 3
            assert_nothing_held(engine)

    asyncio.run(scenario())


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_latents_in_8_bits_are_swapped_with_their_scales(model: Path, kv_cache_dtype: str) -> None:
    async def scenario() -> None:
        flags = {**FLAGS, "kv_cache_dtype": kv_cache_dtype, "enable_prefix_caching": False}
        async with running_engine(model, **flags) as engine:
            expected = await generated(engine, prompts(), GREEDY)
            shape = engine._loaded.model.runner.kv_cache.shape
            assert shape.bytes_per_token == LAYERS * (WIDTH + 4)
        flags |= {"kv_cache_memory_bytes": 25 * shape.bytes_per_block, "swap_space": 0.01}
        async with running_engine(model, device=CpuDevice(1), **flags) as engine:
            assert await generated(engine, prompts(), GREEDY) == expected
            assert metric(engine, "swap_in_blocks_total") > 0
            assert metric(engine, "recomputed_sequences_total") == 0

    asyncio.run(scenario())
