"""Adapters in captured steps: our kernels, recorded graphs, and the tokens of an engine without any.

What a graph had baked in of one step's adapters would give the next step other tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from graphllm.engine.engine import Engine
from graphllm.runner.device import InlineDevice
from graphllm.sampling_params import SamplingParams
from tests.engine.harness import Collector, assert_nothing_held, ended, running_engine, settle
from tests.engine.test_captured_engine import persistent_tensors
from tests.runner.recording_device import RecordingDevice
from tests.tiny_adapters import write_tiny_adapter
from tests.tiny_model import write_tiny_model

# Minutes on a busy machine: every launch of every step goes through the interpreter.
pytestmark = [pytest.mark.triton, pytest.mark.slow, pytest.mark.timeout(900)]

# More adapters than places, so that places are written while graphs with their addresses exist.
REQUESTS = [("a", [7, 8, 9]), (None, [100] * 17), ("b", [3]), ("c", [1, 2] * 9), (None, [5])]
OWN_KERNELS = ("_shrink_", "_expand_", "_decode_tokens_", "_mixed_tokens_")
FLAGS: dict[str, Any] = {
    "enable_lora": True,
    "max_loras": 2,
    "max_lora_rank": 8,
    "max_cpu_loras": 3,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "max_model_len": 64,
    "kv_cache_memory_bytes": 400_000,
    "cudagraph_capture_sizes": (1, 2),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("captured") / "model")


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    root = tmp_path_factory.mktemp("adapters")
    ranks = {"a": 8, "b": 3, "c": 5}
    targets = {
        "a": ("q_proj", "v_proj", "down_proj"),
        "b": ("gate_proj", "o_proj"),
        "c": ("k_proj", "up_proj"),
    }
    return tuple(
        f"{name}={write_tiny_adapter(root / name, seed=rank, rank=rank, targets=targets[name])}"
        for name, rank in ranks.items()
    )


def tensors_of_adapters(engine: Engine) -> Iterator[torch.Tensor]:
    yield from persistent_tensors(engine)
    memory = engine._loaded.model.adapter_memory
    assert memory is not None
    yield memory.memory
    for path in memory.layout.places:
        layer = engine._loaded.model.runner.program._model.get_submodule(path)
        yield layer.adapters._tiles


async def run_all(engine: Engine) -> list[list[int]]:
    collectors = []
    for index, (lora, prompt) in enumerate(REQUESTS):
        collectors.append(Collector())
        params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
        engine.add(f"r{index}", prompt, params=params, sink=collectors[-1], lora=lora)
        for _ in range(3):
            await asyncio.sleep(0)
    await ended(*collectors)
    return [collector.token_ids[0] for collector in collectors]


@pytest.fixture(scope="module")
def expected(model: Path, modules: tuple[str, ...]) -> list[list[int]]:
    """The tokens of the same kernels, launched one by one at each step's own sizes."""

    async def run() -> list[list[int]]:
        async with running_engine(model, device=InlineDevice(), lora_modules=modules, **FLAGS) as engine:
            return await run_all(engine)

    return asyncio.run(run())


def test_replayed_steps_with_and_without_adapters_give_the_same_tokens(
    model: Path, modules: tuple[str, ...], expected: list[list[int]]
) -> None:
    async def run() -> None:
        device = RecordingDevice()
        flags = {**FLAGS, "lora_modules": modules, "eager_capture": True}
        async with running_engine(model, device=device, **flags) as engine:
            device.persistent = lambda: tensors_of_adapters(engine)
            graphs = engine._loaded.model.runner.graphs
            assert await run_all(engine) == expected
            assert graphs.num_misses == 0, "every step of this traffic has a graph"
            replayed = {key: graph for key, graph in graphs._graphs.items() if graph.num_replays > 0}  # type: ignore[attr-defined]
            assert {key.with_adapters for key in replayed} == {True, False}
            for key, graph in replayed.items():
                operations = graph.operations  # type: ignore[attr-defined]
                names = {getattr(operation[0], "__name__", "") for operation in operations}
                uses = any(name.startswith(OWN_KERNELS) for name in names)
                assert uses == key.with_adapters, "a step without adapters launches none of their kernels"
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(run())
