"""Models with sliding windows, far beyond them: transformers' tokens, and no block held that nobody sees."""

from __future__ import annotations

import asyncio
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graphllm.engine.engine import Engine
from graphllm.sampling_params import SamplingParams
from graphllm.scheduler.tiers import ConstantRates
from graphllm.sequence import Sequence
from tests import tiny_model as tiny
from tests.engine.harness import Collector, add, assert_nothing_held, ended, running_engine, settle
from tests.models.families import GEMMA2, GEMMA3, MISTRAL, FamilyCases

WINDOW, BLOCK_SIZE, STEP = 13, 8, 16
CONTEXT = 160
FLAGS: dict[str, Any] = {
    "block_size": BLOCK_SIZE,
    "max_num_seqs": 6,
    "max_num_batched_tokens": STEP,
    "max_model_len": CONTEXT,
    "debug_kv": True,
}
NUM_TOKENS = 60
LONG = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
PROMPT_LENGTHS = (70, 9, 45)


@dataclass(frozen=True, slots=True)
class Windowed:
    """A tiny model with windows: its checkpoint, and the tokens that transformers generates."""

    folder: Path
    windows: tuple[int | None, ...]
    prompts: list[list[int]]
    expected: list[list[int]]


# Five windowed layers and a full one; one and one, with soft caps; windowed layers alone.
CASES: dict[str, tuple[FamilyCases, str, dict[str, Any], tuple[int | None, ...]]] = {
    "five and one": (
        GEMMA3,
        "two bases",
        {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
        (None, *[WINDOW] * 5),
    ),
    "one and one": (GEMMA2, "caps and a window in every other layer", {}, (None, WINDOW)),
    "windows alone": (MISTRAL, "a window", {}, (WINDOW,)),
}


@pytest.fixture(scope="module", params=CASES)
def windowed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Windowed:
    family, variant, keys, windows = CASES[request.param]
    sizes = {"vocab_size": tiny.VOCAB_SIZE, "max_position_embeddings": CONTEXT}
    model = family.tiny(variant, seed=3, **keys, **sizes)
    folder = tmp_path_factory.mktemp("windowed") / "model"
    model.save_pretrained(folder)
    tiny.write_tokenizer(folder)
    goldens = [golden(model, length) for length in PROMPT_LENGTHS]
    return Windowed(folder, windows, [prompt for prompt, _ in goldens], [tokens for _, tokens in goldens])


def golden(model: Any, length: int) -> tuple[list[int], list[int]]:
    """A prompt of random tokens and what follows, for the first seed that meets no near tie on its way."""
    for seed in range(20):
        prompt = random_tokens(length, seed=seed)
        token_ids = list(prompt)
        while len(token_ids) < length + NUM_TOKENS:
            with torch.inference_mode():
                best = model(torch.tensor([token_ids])).logits[0, -1].topk(2)
            if float(best.values[0] - best.values[1]) <= 2e-3:
                break
            token_ids.append(int(best.indices[0]))
        else:
            return prompt, token_ids[length:]
    raise AssertionError("every seed meets a near tie")


def random_tokens(length: int, *, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


def held_columns(sequence: Sequence, group: int, num_groups: int) -> int:
    return sum(block != 0 for block in sequence.block_table[group::num_groups])


def watch(engine: Engine, collector: Collector) -> list[int]:
    """At each token: windowed groups hold no more than they may. Returns the most that each was seen with."""
    scheduler = engine._loaded.model.scheduler
    layout = scheduler.block_manager.layout
    most_held: list[int] = []

    def look(delta: Any) -> None:
        for sequence in scheduler.running:
            for group, window in layout.windowed:
                held = held_columns(sequence, group, layout.num_groups)
                assert held <= layout.most_columns(window, STEP)
                # With the last chunk of the prompt behind it: its window, and the blocks at its two ends.
                if sequence.num_output_tokens > BLOCK_SIZE + 1 and sequence.num_preemptions == 0:
                    assert held <= -(-window // BLOCK_SIZE) + 2
                    most_held.append(held)

    collector.on_write = look
    return most_held


async def generated(engine: Engine, prompts: list[list[int]], params: SamplingParams = LONG) -> list[Any]:
    collectors = [add(engine, f"r{index}", prompt, params) for index, prompt in enumerate(prompts)]
    watched = [watch(engine, collector) for collector in collectors]
    await ended(*collectors)
    await settle(engine)
    assert [collector.error for collector in collectors] == [None] * len(prompts)
    if params.max_tokens == LONG.max_tokens:
        assert any(watched), "nothing was looked at"
    return [collector.token_ids for collector in collectors]


def spoil_free_blocks(engine: Engine) -> None:
    """NaN wherever nobody's tokens lie: whoever reads it has NaN for logits from there on."""
    loaded = engine._loaded.model
    free = torch.tensor([0, *loaded.scheduler.block_manager._free])
    with torch.inference_mode():
        for layer in loaded.runner.kv_cache.layers:
            layer.key[free] = torch.nan
            layer.value[free] = torch.nan


@pytest.mark.parametrize("caches", [False, True], ids=["no caching", "caching"])
def test_tokens_far_beyond_the_window_are_those_of_transformers(windowed: Windowed, caches: bool) -> None:
    async def scenario() -> None:
        flags = FLAGS | {"enable_prefix_caching": caches}
        async with running_engine(windowed.folder, **flags) as engine:
            scheduler = engine._loaded.model.scheduler
            assert scheduler.block_manager.layout.windows == windowed.windows
            collector = Collector()
            collector.on_write = lambda delta: spoil_free_blocks(engine)
            spoil_free_blocks(engine)
            engine.add("spoiled", windowed.prompts[0], params=LONG, sink=collector)
            await ended(collector)
            assert collector.token_ids == [windowed.expected[0]]
            found = await generated(engine, windowed.prompts)
            assert found == [[tokens] for tokens in windowed.expected]
            assert_nothing_held(engine)
            assert (scheduler.counters.num_prefix_hit_tokens > 0) == caches
            metrics = engine.metrics.render().decode()
            released = re.search(r"^graphllm_window_released_blocks_total (\S+)$", metrics, re.MULTILINE)
            assert released is not None and float(released[1]) > 3 * NUM_TOKENS // BLOCK_SIZE

    asyncio.run(scenario())


def test_transformers_own_modules_release_as_well(windowed: Windowed) -> None:
    async def scenario() -> None:
        flags = FLAGS | {"enable_prefix_caching": False, "model_impl": "transformers"}
        async with running_engine(windowed.folder, **flags) as engine:
            assert engine._loaded.model.scheduler.block_manager.layout.windows == windowed.windows
            collector = Collector()
            collector.on_write = lambda delta: spoil_free_blocks(engine)
            spoil_free_blocks(engine)
            engine.add("spoiled", windowed.prompts[0], params=LONG, sink=collector)
            await ended(collector)
            assert collector.token_ids == [windowed.expected[0]]
            assert engine._loaded.model.scheduler.block_manager.num_passed_blocks > 0

    asyncio.run(scenario())


def test_next_turn_finds_all_but_what_lies_behind_windows(windowed: Windowed) -> None:
    async def scenario() -> None:
        async with running_engine(windowed.folder, **FLAGS) as engine:
            await generated(engine, windowed.prompts)
            turn = windowed.prompts[0] + windowed.expected[0][:50]
            collector = add(engine, "turn", turn, replace(LONG, max_tokens=10))
            await ended(collector)
            assert collector.token_ids == [windowed.expected[0][50:60]]
            assert collector.num_cached_tokens == (len(turn) - 1) // BLOCK_SIZE * BLOCK_SIZE
            # A prompt that leaves the conversation early finds its beginning only where that is still whole.
            early = windowed.prompts[0][:64] + [5] * 4
            other = add(engine, "early", early, replace(LONG, max_tokens=2))
            await ended(other)
            async with running_engine(windowed.folder, **FLAGS) as fresh:
                expected = add(fresh, "early", early, replace(LONG, max_tokens=2))
                await ended(expected)
            assert other.token_ids == expected.token_ids
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(scenario())


@pytest.mark.parametrize("swaps", [False, True], ids=["computed again", "swapped"])
def test_pressure_changes_no_token(windowed: Windowed, swaps: bool) -> None:
    async def scenario() -> None:
        async with running_engine(windowed.folder, **FLAGS) as engine:
            plan = engine._loaded.model.plan
        num_blocks = plan.most_blocks_of_a_sequence + 1 + len(windowed.windows)
        pressed = FLAGS | {
            "kv_cache_memory_bytes": num_blocks * plan.bytes_per_block,
            "swap_space": swaps * 2000 * plan.bytes_per_block / 2**30,
        }
        async with running_engine(windowed.folder, **pressed) as engine:
            counters = engine._loaded.model.scheduler.counters
            requests = [prompt for prompt in windowed.prompts for _ in range(3)]
            found = await generated(engine, requests)
            assert found == [[tokens] for tokens in windowed.expected for _ in range(3)]
            if None in windowed.windows:  # windows alone hardly need more than when they start
                assert counters.num_preemptions > 0
            assert (counters.num_swapped_in_blocks > 0) == swaps
            engine._loaded.model.scheduler.check(full=True)
            assert_nothing_held(engine)

    asyncio.run(scenario())


def test_siblings_share_a_prompt_that_has_outgrown_the_window(windowed: Windowed) -> None:
    async def scenario() -> None:
        async with running_engine(windowed.folder, **FLAGS) as engine:
            (collector,) = await generated(engine, windowed.prompts[:1], replace(LONG, n=3))
            assert collector == [windowed.expected[0]] * 3
            assert_nothing_held(engine)

    asyncio.run(scenario())


def test_cold_prefixes_come_back_from_the_host(windowed: Windowed) -> None:
    async def scenario() -> None:
        async with running_engine(windowed.folder, **FLAGS) as engine:
            plan = engine._loaded.model.plan
        num_blocks = 3 * plan.most_blocks_of_a_sequence
        flags = FLAGS | {
            "kv_cache_memory_bytes": num_blocks * plan.bytes_per_block,
            "kv_offloading_size": 2000 * plan.bytes_per_block / 2**30,
        }
        async with running_engine(windowed.folder, **flags) as engine:
            scheduler = engine._loaded.model.scheduler
            scheduler.tiers._predictor = ConstantRates()
            short = replace(LONG, max_tokens=4)
            (found,) = await generated(engine, windowed.prompts[:1], short)
            for seed in range(30, 50):
                await generated(engine, [random_tokens(70, seed=seed)], short)
            assert scheduler.counters.num_fetched_blocks == 0
            assert found == [windowed.expected[0][:4]]
            turn = windowed.prompts[0] + windowed.expected[0][:4]
            (found,) = await generated(engine, [turn], short)
            assert found == [windowed.expected[0][4:8]]
            assert scheduler.counters.num_fetched_blocks > 0
            assert_nothing_held(engine)

    asyncio.run(scenario())
