"""Scoring and pooling behind captured steps: what a graph leaves in the arena is what transformers has.

All but the card is real here, as in `test_captured_engine.py`: padded buckets, replays, our kernels.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from graphllm.runner.device import InlineDevice
from graphllm.sampling_params import SamplingParams
from tests.engine import test_pooling as pooling
from tests.engine import test_prompt_scoring as scoring
from tests.engine.harness import add, assert_nothing_held, ended, running_engine, settle
from tests.engine.test_captured_engine import persistent_tensors
from tests.runner.recording_device import RecordingDevice
from tests.tiny_model import write_tiny_model

# Minutes on a busy machine: every launch of every step goes through the interpreter.
pytestmark = [pytest.mark.triton, pytest.mark.slow, pytest.mark.timeout(900)]

FLAGS: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 20,
    "max_model_len": 64,
    "kv_cache_memory_bytes": 400_000,
    "cudagraph_capture_sizes": (1, 2, 4),
}
DECODING = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
SCORED = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, prompt_logprobs=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("captured") / "model")


async def decoded_alone(model: Path, prompts: list[list[int]]) -> list[list[list[int]]]:
    """The neighbours' tokens without graphs, scoring and pooling."""
    async with running_engine(model, device=InlineDevice(), **FLAGS) as engine:
        collectors = [add(engine, f"r{index}", each, DECODING) for index, each in enumerate(prompts)]
        await ended(*collectors)
        return [collector.token_ids for collector in collectors]


def test_reports_behind_replayed_steps_are_those_of_transformers(model: Path) -> None:
    """A prompt scored in three chunks and one whole, two pooled, beside decoding: more than fit at once."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    neighbours = [[7, 8, 9], [100] * 6]
    scored_prompts = [scoring.prompt(45, seed=1), scoring.prompt(9, seed=2)]
    pooled_prompts = [scoring.prompt(30, seed=3), scoring.prompt(1, seed=4)]

    async def run() -> None:
        alone = await decoded_alone(model, neighbours)
        device = RecordingDevice()
        async with running_engine(model, device=device, eager_capture=True, **FLAGS) as engine:
            device.persistent = lambda: persistent_tensors(engine)
            graphs = engine._loaded.model.runner.graphs
            num_replays = graphs.num_replays
            beside = [add(engine, f"r{index}", each, DECODING) for index, each in enumerate(neighbours)]
            scored = [
                scoring.scoring(engine, f"s{index}", each, SCORED)
                for index, each in enumerate(scored_prompts)
            ]
            pooled = [pooling.Pooled(engine, f"p{index}", each) for index, each in enumerate(pooled_prompts)]
            await ended(*beside, *scored, *pooled)
            for sink, token_ids in zip(scored, scored_prompts, strict=True):
                scoring.assert_equal_to(reference, sink.prompt_logprobs, token_ids)
            for sink, token_ids in zip(pooled, pooled_prompts, strict=True):
                pooling.assert_equal_to(reference, sink.embedding, token_ids)
            assert [collector.token_ids for collector in beside] == alone
            assert graphs.num_misses == 0 and graphs.num_replays > num_replays
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(run())
