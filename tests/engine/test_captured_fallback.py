"""A module of transformers on captured decode steps: the tokens of the same module run step by step."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from graphllm.runner.device import Device, InlineDevice
from graphllm.sampling_params import SamplingParams
from tests.engine.harness import add, assert_nothing_held, ended, running_engine, settle
from tests.models.test_transformers_fallback import save, tiny
from tests.runner.recording_device import RecordingDevice
from tests.tiny_model import VOCAB_SIZE, write_tiny_model

pytestmark = [pytest.mark.triton, pytest.mark.timeout(300)]

FLAGS: dict[str, Any] = {
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "max_model_len": 64,
    "kv_cache_memory_bytes": 200_000,
    "cudagraph_capture_sizes": (1, 2),
}
PROMPTS = [[7, 8, 9], list(range(20))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("captured") / "model")
    return save(tiny("Arcee", num_hidden_layers=1, vocab_size=VOCAB_SIZE, eos_token_id=256), folder)


async def tokens_of_all(model: Path, device: Device, **flags: Any) -> tuple[list[list[list[int]]], Any]:
    """The requests' tokens, and the keys of the graphs there are with the number of replays."""
    async with running_engine(model, device=device, **FLAGS, **flags) as engine:
        collectors = []
        for index, prompt in enumerate(PROMPTS):
            params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
            collectors.append(add(engine, f"r{index}", prompt, params))
            for _ in range(3):
                await asyncio.sleep(0)
        await ended(*collectors)
        await settle(engine)
        assert_nothing_held(engine)
        graphs = engine._loaded.model.runner.graphs
        return [collector.token_ids for collector in collectors], (list(graphs._graphs), graphs.num_replays)


def test_replayed_decode_steps_give_the_tokens_of_steps_without_graphs(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, (_, num_replays) = asyncio.run(tokens_of_all(model, InlineDevice()))
    assert num_replays == 0
    with caplog.at_level(logging.INFO):
        found, (keys, num_replays) = asyncio.run(tokens_of_all(model, RecordingDevice(), eager_capture=True))
    assert found == expected
    assert num_replays > 0
    shapes = [key.shape for key in keys if key.shape is not None]
    assert shapes and all(shape.bucket.is_decode for shape in shapes), "steps with prompts stay eager"
    assert "decode steps of transformers' module are captured" in caplog.text
