"""Two groups of layers on captured steps: the tokens of the same kernels launched one by one.

Which blocks a group has is in no graph, and no launch reads one that lies behind its window: those hold NaN
in the captured run.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graphllm.engine.engine import Engine
from graphllm.outputs import SequenceDelta
from graphllm.runner.device import Device, InlineDevice
from graphllm.sampling_params import SamplingParams
from tests.engine.harness import Collector, assert_nothing_held, ended, running_engine, settle
from tests.runner.recording_device import RecordingDevice

# Minutes on a busy machine: every launch of every step goes through the interpreter.
pytestmark = [pytest.mark.triton, pytest.mark.slow, pytest.mark.timeout(900)]

WINDOW = 9
CONFIG: dict[str, Any] = {
    "architectures": ["MinistralForCausalLM"],
    "head_dim": 16,
    "hidden_size": 48,
    "intermediate_size": 40,
    "layer_types": ["full_attention", "sliding_attention"],
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "sliding_window": WINDOW,
    "tie_word_embeddings": False,
    "vocab_size": 300,
}
FLAGS: dict[str, Any] = {
    "load_format": "dummy",
    "block_size": 8,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 16,
    "max_model_len": 64,
    "kv_cache_memory_bytes": 200_000,
    "cudagraph_capture_sizes": (1, 2),
    "debug_kv": True,
    "enable_prefix_caching": False,
}
PROMPTS = [list(range(5)), list(range(100, 130))]
PARAMS = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("windows") / "windows.json"
    path.write_text(json.dumps(CONFIG))
    return path


def spoil_free_blocks(engine: Engine) -> None:
    loaded = engine._loaded.model
    free = torch.tensor(list(loaded.scheduler.block_manager._free))
    with torch.inference_mode():
        for layer in loaded.runner.kv_cache.layers:
            layer.key[free] = torch.nan
            layer.value[free] = torch.nan


async def tokens_of_all(
    model: Path, device: Device, *, spoils: bool, **flags: Any
) -> tuple[list[list[list[int]]], int]:
    """The requests' tokens, and how often a graph was replayed."""
    async with running_engine(model, device=device, **FLAGS, **flags) as engine:
        assert engine._loaded.model.scheduler.block_manager.layout.windows == (None, WINDOW)
        collectors: list[Collector] = []
        num_released: list[int] = []

        def look(delta: SequenceDelta) -> None:
            running = engine._loaded.model.scheduler.running
            num_released.append(sum(sequence.block_table.count(0) for sequence in running))
            if spoils:
                spoil_free_blocks(engine)

        for index, prompt in enumerate(PROMPTS):
            collector = Collector()
            collector.on_write = look
            engine.add(f"r{index}", prompt, params=PARAMS, sink=collector)
            collectors.append(collector)
            for _ in range(3):
                await asyncio.sleep(0)
        await ended(*collectors)
        await settle(engine)
        assert max(num_released) >= 2, "nothing was released while it ran"
        assert_nothing_held(engine)
        tokens = [collector.token_ids for collector in collectors]
        return tokens, engine._loaded.model.runner.graphs.num_replays


def test_replayed_steps_give_the_tokens_of_steps_without_graphs(model: Path) -> None:
    expected, num_replays = asyncio.run(tokens_of_all(model, InlineDevice(), spoils=False))
    assert num_replays == 0
    found, num_replays = asyncio.run(tokens_of_all(model, RecordingDevice(), spoils=True, eager_capture=True))
    assert num_replays > 0
    assert found == expected
