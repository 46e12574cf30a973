"""Rows that wait for a mask have a sampler graph of their own, behind a forward without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graphllm.config import EngineConfig
from graphllm.engine.loading import LoadedModel, load
from graphllm.runner.model_runner import StepHandle
from tests.runner.recording_device import RecordingDevice
from tests.runner.test_model_runner import allow_only, schedule
from tests.tiny_model import write_tiny_model

pytestmark = [pytest.mark.triton, pytest.mark.slow, pytest.mark.timeout(900)]


def launch_held(model: LoadedModel, *prompts: list[int]) -> StepHandle:
    """The next step, its first pair held back."""
    batch = schedule(model, *prompts)
    batch.pairs[0] = replace(batch.pairs[0], held=True)
    return model.runner.launch(batch)


def complete(model: LoadedModel, handle: StepHandle) -> list[int]:
    result = handle.result()
    model.scheduler.step_completed(handle.batch.step_id)
    model.scheduler.apply(handle.batch, result)
    return result.token_ids


def test_held_and_free_rows_are_sampled_by_replays_once_they_are_captured(tmp_path: Path) -> None:
    config = EngineConfig(
        model=str(write_tiny_model(tmp_path / "model")),
        max_num_seqs=2,
        max_num_batched_tokens=8,
        max_model_len=32,
        kv_cache_memory_bytes=200_000,
    )
    with torch.inference_mode():
        model = load(config, RecordingDevice(), show_progress=False)
        graphs = model.runner.graphs
        handle = launch_held(model, [1, 2, 3], [4, 5])
        allow_only(handle, 77)
        assert complete(model, handle)[0] == 77
        for forced in (78, 79):
            while graphs.has_captures_due:
                graphs.capture_slice()
            num_misses, num_replays = graphs.num_misses, graphs.num_replays
            handle = launch_held(model)
            assert not handle.ready(), "the held row waits, and its neighbour does not"
            allow_only(handle, forced)
            assert complete(model, handle)[0] == forced
        assert graphs.num_misses == num_misses, "forward, free sampler and masked sampler have graphs"
        assert graphs.num_replays == num_replays + 3
