"""The runner's two phases, over a real tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graphllm.batch import ScheduledBatch
from graphllm.config import EngineConfig
from graphllm.engine.loading import LoadedModel, load
from graphllm.runner.device import InlineDevice
from graphllm.runner.model_runner import StepHandle
from graphllm.sampling_params import SamplingParams
from graphllm.sequence import SequenceGroup
from tests.tiny_model import write_tiny_model


@pytest.fixture
def model(tmp_path: Path) -> LoadedModel:
    config = EngineConfig(model=str(write_tiny_model(tmp_path / "model")), max_num_seqs=4)
    with torch.inference_mode():
        return load(config, InlineDevice(), show_progress=False)


def schedule(model: LoadedModel, *prompts: list[int]) -> ScheduledBatch:
    for prompt in prompts:
        params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        group = SequenceGroup(f"r{prompt}", prompt, params=params, seed=0, max_total_tokens=len(prompt) + 8)
        model.scheduler.add(group)
    batch = model.scheduler.schedule()
    assert batch is not None
    return batch


def allow_only(handle: StepHandle, token_id: int) -> None:
    """Mask every held row but for one token, and sample."""
    for _, row in handle.held_rows:
        assert (row == -1).all(), "a row starts with everything allowed"
        row.fill(0)
        row.view("uint32")[token_id // 32] = 1 << token_id % 32
    handle.sample()


def complete(model: LoadedModel, batch: ScheduledBatch) -> list[int]:
    handle = model.runner.launch(batch)
    result = handle.result()
    model.scheduler.step_completed(batch.step_id)
    model.scheduler.apply(batch, result)
    return result.token_ids


def test_held_row_waits_for_its_mask_and_its_neighbour_does_not(model: LoadedModel) -> None:
    prompts = [1, 2, 3], [4, 5, 6, 7]
    batch = schedule(model, *prompts)
    batch.pairs[0] = replace(batch.pairs[0], held=True)
    handle = model.runner.launch(batch)
    assert not handle.ready()
    table = model.runner.buffers.token_table
    neighbour = int(table[batch.pairs[1].slot, 4])
    allow_only(handle, 77)
    assert handle.ready()
    result = handle.result()
    assert result.token_ids == [77, neighbour]
    assert int(table[batch.pairs[0].slot, 3]) == 77, "the masked token feeds the next step"


def test_held_sampling_without_restriction_changes_nothing(model: LoadedModel, tmp_path: Path) -> None:
    free = complete(model, schedule(model, [1, 2, 3]))
    other = load(
        EngineConfig(model=str(tmp_path / "model"), max_num_seqs=4), InlineDevice(), show_progress=False
    )
    batch = schedule(other, [1, 2, 3])
    batch.pairs[0] = replace(batch.pairs[0], held=True)
    handle = other.runner.launch(batch)
    handle.sample()
    assert handle.result().token_ids == free


def test_mask_rows_forget_what_an_earlier_step_wrote_in_them(model: LoadedModel) -> None:
    tokens = []
    for _ in range(8):  # each entry of the ring twice and more
        batch = schedule(model, [1, 2, 3]) if not tokens else model.scheduler.schedule()
        assert batch is not None
        batch.pairs[0] = replace(batch.pairs[0], held=True)
        handle = model.runner.launch(batch)
        allow_only(handle, 40 + len(tokens))
        result = handle.result()
        model.scheduler.step_completed(batch.step_id)
        model.scheduler.apply(batch, result)
        tokens += result.token_ids
    assert tokens == list(range(40, 48))


def test_step_of_unchanged_membership_uploads_no_rows(model: LoadedModel) -> None:
    complete(model, schedule(model, [1, 2, 3], [4, 5]))
    uploads = []
    for _ in range(3):
        batch = model.scheduler.schedule()
        assert batch is not None
        handle = model.runner.launch(batch)
        uploads.append(handle._entry.upload_rows)
        result = handle.result()
        model.scheduler.step_completed(batch.step_id)
        model.scheduler.apply(batch, result)
    assert uploads == [True, False, False]


def test_result_of_a_running_step_is_never_waited_for(model: LoadedModel) -> None:
    batch = schedule(model, [1, 2, 3])
    batch.pairs[0] = replace(batch.pairs[0], held=True)
    handle = model.runner.launch(batch)
    with pytest.raises(AssertionError, match="still running"):
        handle.result()
