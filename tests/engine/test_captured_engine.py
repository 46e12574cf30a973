"""The engine on captured steps: our kernels, recorded graphs, and the tokens of an engine without any.

Everything of the CUDA path but the card is real here: padded buckets, the device's sampler, attention over
the work list, captures between steps, replays at addresses that were fixed before. A length, slot or
parameter of some step that a graph had baked in would give the next step other tokens.
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
from tests.engine.harness import add, assert_nothing_held, ended, running_engine, settle
from tests.runner.recording_device import RecordingDevice
from tests.tiny_model import write_tiny_model

# Minutes on a busy machine: every launch of every step goes through the interpreter.
pytestmark = [pytest.mark.triton, pytest.mark.slow, pytest.mark.timeout(900)]

FLAGS: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 24,
    "max_model_len": 64,
    "kv_cache_memory_bytes": 400_000,
    "cudagraph_capture_sizes": (1, 2, 4),
}
PROMPTS = [[7, 8, 9], [100] * 17, list(range(40)), [3]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("captured") / "model")


def persistent_tensors(engine: Engine) -> Iterator[torch.Tensor]:
    """Every tensor whose address outlives a step."""
    runner = engine._loaded.model.runner
    model = runner.program._model
    yield from model.parameters()
    yield from model.buffers()
    buffers = runner.buffers
    yield from (value for value in vars(buffers).values() if isinstance(value, torch.Tensor))
    for owner in (buffers.sampling, buffers.results, buffers._inputs):
        yield from (getattr(owner, name) for name in owner.__slots__)
    yield from runner.arena._buffers.values()
    for layer in runner.kv_cache.layers:
        yield from (layer.key, layer.value)


def params(**values: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 5, "ignore_eos": True, **values})


REQUESTS = [
    params(),
    params(temperature=0.8, top_k=20, seed=5),
    params(temperature=1.0, top_p=0.9, seed=6, n=2),
    params(repetition_penalty=1.3, logit_bias={5: 2.0}, min_tokens=3),
]


async def run_all(engine: Engine) -> list[list[list[int]]]:
    """Requests that come and go at different times, so that steps of many sizes follow each other."""
    collectors = []
    for index, (prompt, request) in enumerate(zip(PROMPTS, REQUESTS, strict=True)):
        collectors.append(add(engine, f"r{index}", prompt, request))
        for _ in range(3):
            await asyncio.sleep(0)
    await ended(*collectors)
    return [collector.token_ids for collector in collectors]


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[list[int]]]:
    """The tokens of the same kernels, launched one by one at each step's own sizes."""

    async def run() -> list[list[list[int]]]:
        async with running_engine(model, device=InlineDevice(), **FLAGS) as engine:
            assert not engine._loaded.model.runner.graphs.is_enabled
            return await run_all(engine)

    return asyncio.run(run())


def test_replayed_steps_give_the_tokens_of_steps_without_graphs(
    model: Path, expected: list[list[list[int]]]
) -> None:
    async def run() -> None:
        device = RecordingDevice()
        async with running_engine(model, device=device, eager_capture=True, **FLAGS) as engine:
            device.persistent = lambda: persistent_tensors(engine)
            graphs = engine._loaded.model.runner.graphs
            assert await run_all(engine) == expected
            assert graphs.num_misses == 0, "every step of this traffic has a graph"
            assert sum(graph.num_replays > 1 for graph in device.graphs_made) >= 3
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(run())


def test_graphs_are_captured_while_requests_run_and_change_nothing(
    model: Path, expected: list[list[list[int]]]
) -> None:
    async def run() -> None:
        device = RecordingDevice()
        async with running_engine(model, device=device, **FLAGS) as engine:
            device.persistent = lambda: persistent_tensors(engine)
            graphs = engine._loaded.model.runner.graphs
            assert await run_all(engine) == expected
            assert graphs.num_misses > 0 and graphs.num_captured > 0 and graphs.num_replays > 0
            assert b"graphllm_graph_misses_total" in engine.metrics.render()

    asyncio.run(run())
