"""Adapters mixed in one batch with the base model, against peft's own merged weights.

peft makes the adapters and merges them; transformers continues the prompts with each merged model by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from graphllm.engine.engine import Engine
from graphllm.runner.device import CpuDevice
from graphllm.sampling_params import SamplingParams
from tests.engine.harness import Collector, ended, running_engine
from tests.engine.peft_oracle import PEFT_WARNINGS, greedy, merged_model, write_adapter
from tests.tiny_model import HEAD_DIM, KV_HEADS, LAYERS, write_tiny_model

pytestmark = PEFT_WARNINGS

Answers = dict[str | None, list[list[int]]]
"""Tokens by adapter, None for the base, and prompt."""

NUM_TOKENS = 12
PROMPTS = [[5, 6, 7], [100, 42] * 9, list(range(61, 102)), [5]]
SHORT_PROMPTS, MANY_TOKENS = [[5, 6, 7], [7], [8, 3]], 30
# Different ranks, targets, factors and ways to give them; the second leaves keys and most layers alone.
ADAPTERS: dict[str, dict[str, Any]] = {
    "everywhere": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "queries": {"r": 3, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["k_proj", "o_proj", "up_proj", "down_proj"],
        "rank_pattern": {"o_proj": 6, r"layers\.1\.mlp\.down_proj": 2},
        "alpha_pattern": {"up_proj": 10},
    },
    "one layer": {
        "r": 5,
        "lora_alpha": 9,
        "target_modules": ["gate_proj", "q_proj"],
        "layers_to_transform": [1],
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("lora") / "model")


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that peft has written."""
    folders = {}
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        folder = tmp_path_factory.mktemp(f"adapter-{seed}") / "adapter"
        folders[name] = write_adapter(model, folder, seed=seed, **config)
    return folders


@pytest.fixture(scope="module")
def merged(model: Path, adapters: dict[str, Path]) -> dict[str | None, torch.nn.Module]:
    """The base, under None, and it merged with each adapter."""
    return {None: merged_model(model), **{name: merged_model(model, path) for name, path in adapters.items()}}


@pytest.fixture(scope="module")
def expected(merged: dict[str | None, torch.nn.Module]) -> Answers:
    return {name: [greedy(model, prompt, NUM_TOKENS) for prompt in PROMPTS] for name, model in merged.items()}


def flags(adapters: dict[str, Path], **values: Any) -> dict[str, Any]:
    modules = tuple(f"{name}={path}" for name, path in adapters.items())
    return {
        "enable_lora": True,
        "lora_modules": modules,
        "max_loras": 4,
        "max_lora_rank": 8,
        "max_num_seqs": 20,
        "max_model_len": 64,
        "max_num_batched_tokens": 40,
        **values,
    }


async def run_all(
    engine: Engine,
    names: Iterable[str | None] = (None, *ADAPTERS),
    prompts: list[list[int]] = PROMPTS,
    num_tokens: int = NUM_TOKENS,
) -> Answers:
    """Every prompt with every adapter, all at once."""
    collectors = {}
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    for name in names:
        for index, prompt in enumerate(prompts):
            collectors[name, index] = collector = Collector()
            engine.add(f"{name}-{index}", prompt, params=params, sink=collector, lora=name)
    await ended(*collectors.values())
    return {name: [collectors[name, index].token_ids[0] for index in range(len(prompts))] for name in names}


def test_adapters_and_base_mixed_in_one_batch_say_what_merged_models_say(
    model: Path, adapters: dict[str, Path], expected: Answers
) -> None:
    assert len({str(tokens) for tokens in expected.values()}) == 1 + len(ADAPTERS), "all differ"

    async def scenario() -> None:
        async with running_engine(model, debug_kv=True, **flags(adapters)) as engine:
            assert await run_all(engine) == expected
            # Again, from cached prefixes, which no adapter shares with another.
            assert await run_all(engine) == expected

    asyncio.run(scenario())


@pytest.mark.parametrize("max_loras", [1, 2])
def test_more_adapters_than_places_take_turns(
    max_loras: int, model: Path, adapters: dict[str, Path], expected: Answers
) -> None:
    async def scenario() -> None:
        device = CpuDevice(num_threads=1)
        config = flags(adapters, max_loras=max_loras, max_cpu_loras=4, max_num_seqs=6)
        async with running_engine(model, device=device, debug_kv=True, **config) as engine:
            assert await run_all(engine) == expected

    asyncio.run(scenario())


@pytest.fixture(scope="module")
def long_answers(merged: dict[str | None, torch.nn.Module]) -> Answers:
    names = (None, "queries", "patterns")
    return {name: [greedy(merged[name], prompt, MANY_TOKENS) for prompt in SHORT_PROMPTS] for name in names}


@pytest.mark.parametrize("swap_space", [0.0, 0.01])
def test_preempted_sequences_come_back_with_their_adapters(
    swap_space: float, model: Path, adapters: dict[str, Path], long_answers: Answers
) -> None:
    """Two adapters and the base take turns in one place, with memory for two or three whole sequences."""
    bytes_per_block = 8 * 2 * LAYERS * KV_HEADS * HEAD_DIM * 4
    tight = {"kv_cache_memory_bytes": 13 * bytes_per_block, "swap_space": swap_space, "block_size": 8}

    async def scenario() -> None:
        config = flags(adapters, max_loras=1, max_cpu_loras=4, enable_prefix_caching=False, **tight)
        async with running_engine(model, debug_kv=True, **config) as engine:
            assert await run_all(engine, long_answers, SHORT_PROMPTS, MANY_TOKENS) == long_answers
            counters = engine._loaded.model.scheduler.counters
            assert counters.num_preemptions > 2, "memory was short"
            assert (counters.num_preemptions > counters.num_recomputed) == (swap_space > 0)

    asyncio.run(scenario())
