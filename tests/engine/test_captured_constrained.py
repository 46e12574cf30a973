"""Constrained and free rows on captured steps: three graphs a step, the tokens of runs without neighbours.

The forward, the sampler of the free rows and the masked sampler are graphs of their own here, so a mask row,
a line or a slot that belonged to another step would show in the tokens.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from graphllm.engine.engine import Engine
from graphllm.runner.device import InlineDevice
from graphllm.sampling_params import SamplingParams
from graphllm.structured_outputs import StructuredOutputs
from tests.engine.harness import add, assert_nothing_held, ended, running_engine, settle
from tests.engine.languages import WORDS, LanguageCompiler
from tests.runner.recording_device import RecordingDevice
from tests.tiny_model import write_tiny_model

# Minutes on a busy machine: every launch of every step goes through the interpreter.
pytestmark = [pytest.mark.triton, pytest.mark.slow, pytest.mark.timeout(900)]

FLAGS: dict[str, Any] = {
    "max_num_seqs": 6,
    "max_num_batched_tokens": 24,
    "max_model_len": 64,
    "kv_cache_memory_bytes": 400_000,
    "cudagraph_capture_sizes": (1, 2, 4, 6),
}
TEXT = StructuredOutputs(choice=WORDS)
# Three of each kind, so that both samplers that stand alone are padded to four.
REQUESTS = [
    ([7, 8, 9], SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)),
    ([100] * 17, SamplingParams(temperature=1.0, max_tokens=6, seed=5, n=2, structured_outputs=TEXT)),
    ([3], SamplingParams(temperature=1.0, max_tokens=5, seed=8, ignore_eos=True)),
    ([4, 4], SamplingParams(temperature=0.7, max_tokens=5, seed=9, ignore_eos=True)),
    ([3, 4], SamplingParams(temperature=0.0, max_tokens=5, logprobs=2, structured_outputs=TEXT)),
]


async def run_all(engine: Engine, *, together: bool) -> list[list[list[int]]]:
    LanguageCompiler().install(engine)
    collectors = []
    for index, (prompt, params) in enumerate(REQUESTS):
        collectors.append(add(engine, f"r{index}", prompt, params))
        if not together:
            await ended(collectors[-1])
    await ended(*collectors)
    assert [collector.error for collector in collectors] == [None] * len(REQUESTS)
    await settle(engine)
    assert_nothing_held(engine)
    return [collector.token_ids for collector in collectors]


def test_constrained_and_free_rows_on_replayed_steps_give_the_tokens_of_runs_without_neighbours(
    tmp_path: Path,
) -> None:
    model = write_tiny_model(tmp_path / "model")

    async def run() -> None:
        async with running_engine(model, device=InlineDevice(), look_ahead=False, **FLAGS) as engine:
            expected = await run_all(engine, together=False)
        async with running_engine(model, device=RecordingDevice(), **FLAGS) as engine:
            graphs = engine._loaded.model.runner.graphs
            assert await run_all(engine, together=True) == expected
            while graphs.has_captures_due:
                graphs.capture_slice()
            num_replays = graphs.num_replays
            assert await run_all(engine, together=True) == expected
            assert graphs.num_replays >= num_replays + 6, "masked samplers are replayed too"
            masked = [key for key in graphs._graphs if key.is_masked]
            assert masked, "a masked sampler was captured"

    asyncio.run(run())
