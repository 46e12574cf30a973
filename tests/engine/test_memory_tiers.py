"""Pressure on KV memory, with and without a host tier: the same tokens, nothing held, and counted."""

from __future__ import annotations

import asyncio
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from graphllm.cache.kv_cache import KVCacheShape
from graphllm.engine.engine import Engine, EngineState
from graphllm.engine.measured_rates import MeasuredRates
from graphllm.errors import EngineUnavailableError, StepFailedError
from graphllm.runner.device import CpuDevice, DeviceEvent, InlineDevice, Work
from graphllm.sampling_params import SamplingParams
from tests import tiny_model as tiny
from tests.engine.harness import (
    Collector,
    FaultyCpuDevice,
    add,
    assert_nothing_held,
    ended,
    running_engine,
    settle,
)

BLOCK_SIZE = 8
NUM_SEQUENCES = 16
PROMPT_TOKENS, OUTPUT_TOKENS = 20, 100
BLOCKS_PER_SEQUENCE = -(-(PROMPT_TOKENS + OUTPUT_TOKENS) // BLOCK_SIZE)
LONG = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)


def block_bytes() -> int:
    return KVCacheShape(
        num_layers=tiny.LAYERS,
        num_kv_heads=tiny.KV_HEADS,
        head_dim=tiny.HEAD_DIM,
        block_size=BLOCK_SIZE,
        dtype=torch.float32,
    ).bytes_per_block


def gib(num_blocks: float) -> float:
    return num_blocks * block_bytes() / 1024**3


def prompts(count: int = NUM_SEQUENCES) -> list[list[int]]:
    rng = random.Random(2)
    return [[rng.randrange(256) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def metric(engine: Engine, name: str) -> float:
    match = re.search(rf"^graphllm_{name} (\S+)$", engine.metrics.render().decode(), re.MULTILINE)
    assert match is not None, name
    return float(match[1])


async def generated(engine: Engine, requests: list[list[int]], params: SamplingParams = LONG) -> Any:
    collectors = [add(engine, f"r{index}", request, params) for index, request in enumerate(requests)]
    await ended(*collectors)
    await settle(engine)
    assert [collector.error for collector in collectors] == [None] * len(requests)
    return [collector.token_ids for collector in collectors]


FLAGS: dict[str, Any] = {
    "block_size": BLOCK_SIZE,
    "max_num_seqs": NUM_SEQUENCES,
    "max_model_len": PROMPT_TOKENS + OUTPUT_TOKENS,
    "debug_kv": True,
}
ONE = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
SHORT = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
# KV for 4 of the 16 long generations, and the null block.
PRESSED: dict[str, Any] = {**FLAGS, "kv_cache_memory_bytes": (4 * BLOCKS_PER_SEQUENCE + 1) * block_bytes()}


@pytest.mark.parametrize("device", [InlineDevice, lambda: CpuDevice(1)], ids=["inline", "cpu"])
@pytest.mark.parametrize(
    ("host_sequences", "swaps", "recomputes"),
    [(0, False, True), (NUM_SEQUENCES, True, False), (1.5, True, True)],
    ids=["device only", "host tier", "host tier full"],
)
def test_all_long_generations_finish_with_the_tokens_of_an_unpressured_run(
    tiny_model: Path, host_sequences: float, swaps: bool, recomputes: bool, device: type
) -> None:
    async def scenario() -> None:
        requests = prompts()
        async with running_engine(tiny_model, **FLAGS) as engine:
            expected = await generated(engine, requests)
            assert metric(engine, "preemptions_total") == 0
        space = gib(host_sequences * BLOCKS_PER_SEQUENCE)
        async with running_engine(tiny_model, device=device(), swap_space=space, **PRESSED) as engine:
            assert await generated(engine, requests) == expected
            assert metric(engine, "preemptions_total") > 0
            assert (metric(engine, "swap_out_blocks_total") > 0) == swaps
            assert (metric(engine, "recomputed_sequences_total") > 0) == recomputes
            num_bytes = metric(engine, "swap_out_bytes_total")
            assert num_bytes == metric(engine, "swap_out_blocks_total") * block_bytes()
            num_bytes = metric(engine, "swap_in_bytes_total")
            assert num_bytes == metric(engine, "swap_in_blocks_total") * block_bytes()
            assert_nothing_held(engine)
            assert metric(engine, "host_blocks_held") == 0
            engine._loaded.model.scheduler.check(full=True)

    asyncio.run(scenario())


class FaultyCopies(CpuDevice):
    """The copies whose number is in `faults` fail after they were done in part."""

    def __init__(self, *faults: int) -> None:
        super().__init__(1)
        self.faults = frozenset(faults)
        self.num_copies = 0

    def submit_copy(self, work: Work, *, behind_steps: bool) -> DeviceEvent:
        number, self.num_copies = self.num_copies, self.num_copies + 1

        def fail() -> None:
            raise RuntimeError("injected fault")

        return super().submit_copy(fail if number in self.faults else work, behind_steps=behind_steps)


def test_a_failed_copy_costs_time_and_no_tokens(tiny_model: Path) -> None:
    async def scenario() -> None:
        requests = prompts()
        async with running_engine(tiny_model, **FLAGS) as engine:
            expected = await generated(engine, requests)
        device = FaultyCopies(*range(0, 40, 3))
        space = gib(NUM_SEQUENCES * BLOCKS_PER_SEQUENCE)
        async with running_engine(tiny_model, device=device, swap_space=space, **PRESSED) as engine:
            assert await generated(engine, requests) == expected
            assert metric(engine, "failed_transfers_total") > 0
            assert metric(engine, "swap_in_blocks_total") > 0
            assert_nothing_held(engine)

    asyncio.run(scenario())


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8", "bfloat16"])
def test_blocks_in_fewer_bits_are_swapped_with_their_scales(tiny_model: Path, kv_cache_dtype: str) -> None:
    async def scenario() -> None:
        requests = prompts()
        flags = {**FLAGS, "kv_cache_dtype": kv_cache_dtype, "enable_prefix_caching": False}
        async with running_engine(tiny_model, **flags) as engine:
            expected = await generated(engine, requests)
            shape = engine._loaded.model.runner.kv_cache.shape
        flags["kv_cache_memory_bytes"] = (4 * BLOCKS_PER_SEQUENCE + 1) * shape.bytes_per_block
        async with running_engine(tiny_model, device=CpuDevice(1), swap_space=0.01, **flags) as engine:
            assert await generated(engine, requests) == expected
            assert metric(engine, "swap_in_blocks_total") > 0
            assert metric(engine, "recomputed_sequences_total") == 0

    asyncio.run(scenario())


def test_a_prefix_seen_before_is_not_computed_and_changes_no_token(tiny_model: Path) -> None:
    async def scenario() -> None:
        prefix = [7] * 10 + list(range(60))
        requests = [[*prefix, index, 3] for index in range(5)]
        outputs = {}
        for caching in (False, True):
            async with running_engine(
                tiny_model, device=CpuDevice(1), enable_prefix_caching=caching, block_size=8, debug_kv=True
            ) as engine:
                outputs[caching] = []
                cached = []
                for index, request in enumerate(requests):
                    collector = add(engine, f"r{index}", request, SHORT)
                    await ended(collector)
                    outputs[caching].append(collector.token_ids)
                    cached.append(collector.num_cached_tokens)
                # 70 tokens are 8 whole blocks of 8.
                assert cached == ([0, 64, 64, 64, 64] if caching else [0] * 5)
                assert metric(engine, "prefix_cache_hits_total") == (4 * 64 if caching else 0)
                assert (metric(engine, "kv_blocks_cached") > 0) == caching
        assert outputs[True] == outputs[False]

    asyncio.run(scenario())


def test_requests_of_another_salt_share_nothing(tiny_model: Path) -> None:
    async def scenario() -> None:
        request = list(range(40))
        async with running_engine(tiny_model, block_size=8) as engine:
            cached = []
            for index, salt in enumerate([None, "a", "a", "b", None]):
                collector = Collector()
                engine.add(f"r{index}", request, params=ONE, sink=collector, cache_salt=salt)
                await ended(collector)
                cached.append(collector.num_cached_tokens)
            assert cached == [0, 0, 32, 0, 32]
            engine.default_cache_salt = "the key's"
            for index, num_cached_tokens in enumerate([0, 32]):
                collector = add(engine, f"own{index}", request, ONE)
                await ended(collector)
                assert collector.num_cached_tokens == num_cached_tokens

    asyncio.run(scenario())


def test_a_cold_prefix_goes_to_host_memory_and_is_copied_up_again(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A copy is always taken to be sooner done than computing.
    monkeypatch.setattr(MeasuredRates, "seconds_to_prefill", lambda rates, num_tokens: 1e9)

    async def scenario() -> None:
        rng = random.Random(1)
        prefixes = [[rng.randrange(256) for _ in range(96)] for _ in range(6)]
        flags = {**FLAGS, "kv_cache_memory_bytes": (3 * 15 + 1) * block_bytes()}
        async with running_engine(tiny_model, **FLAGS, enable_prefix_caching=False) as engine:
            expected = [await generated(engine, [prefix], SHORT) for prefix in prefixes]
        async with running_engine(
            tiny_model,
            device=CpuDevice(1),
            kv_offloading_size=gib(200),
            max_num_batched_tokens=32,
            **flags,
        ) as engine:
            for _ in range(2):
                for index, prefix in enumerate(prefixes):
                    assert await generated(engine, [prefix], SHORT) == expected[index]
            assert metric(engine, "offloaded_blocks_total") > 0
            assert metric(engine, "fetched_blocks_total") > 0
            assert metric(engine, "host_blocks_cached") > 0
            assert metric(engine, "preemptions_total") == 0
            assert_nothing_held(engine)

    asyncio.run(scenario())


@pytest.mark.parametrize("fault", range(3))
def test_readers_of_a_prefix_whose_step_failed_compute_it_themselves(tiny_model: Path, fault: int) -> None:
    async def scenario() -> None:
        prefix = list(range(100, 180))
        requests = [[*prefix, index] for index in range(4)]
        async with running_engine(tiny_model, **FLAGS) as engine:
            expected = await generated(engine, requests, SHORT)
        device = FaultyCpuDevice(1)
        flags = {**FLAGS, "max_num_batched_tokens": 48}
        async with running_engine(tiny_model, device=device, **flags) as engine:
            device.arm(fault)
            collectors = [add(engine, f"r{index}", each, SHORT) for index, each in enumerate(requests)]
            await ended(*collectors)
            await settle(engine)
            failed = [collector for collector in collectors if collector.error is not None]
            assert failed and all(isinstance(each.error, StepFailedError) for each in failed)
            for collector, tokens in zip(collectors, expected, strict=True):
                assert collector.error is not None or collector.token_ids == tokens
            assert await generated(engine, requests, SHORT) == expected
            assert_nothing_held(engine)

    asyncio.run(scenario())


def test_a_violated_invariant_ends_the_engine_under_debug_kv(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model, **FLAGS) as engine:
            manager = engine._loaded.model.scheduler.block_manager

            def corrupt(delta: object) -> None:
                manager._reference_counts[engine._loaded.model.scheduler.running[0].block_table[0]] += 1

            collector = add(engine, "r", list(range(20)), LONG)
            collector.on_write = corrupt
            await ended(collector)
            assert isinstance(collector.error, EngineUnavailableError)
            assert engine.state is EngineState.FAILED

    asyncio.run(scenario())


def test_every_number_of_kv_memory_is_in_the_metrics(tiny_model: Path) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model, swap_space=gib(10), **FLAGS) as engine:
            before = metric(engine, "prefix_cache_queries_total")
            await generated(engine, prompts(3), SHORT)
            assert metric(engine, "prefix_cache_queries_total") - before == 3 * PROMPT_TOKENS
            assert metric(engine, "host_blocks_total") == 10
            for way in ("swap_out", "swap_in"):
                assert metric(engine, f"{way}_blocks_total") == metric(engine, f"{way}_bytes_total") == 0
            for name in ("offloaded_blocks_total", "fetched_blocks_total", "kv_blocks_pinned"):
                assert metric(engine, name) == 0
            assert metric(engine, "kv_unused_share") == 0
            running = add(engine, "running", list(range(20)), LONG)
            shares: list[float] = []
            running.on_write = lambda delta: shares.append(metric(engine, "kv_unused_share"))
            await ended(running)
            # A block of 8 has 0 to 7 unused positions, of 3 blocks and more.
            assert 0 < max(shares) <= 7 / 24

    asyncio.run(scenario())
