"""A packed checkpoint in a folder, served: its tokens are those of the plain numbers that it stands for."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graphllm.errors import ConfigError
from graphllm.sampling_params import SamplingParams
from graphllm.scheduler.scheduler import Scheduler
from tests.engine.harness import add, ended, running_engine
from tests.models import packers
from tests.models.memory_checkpoint import MemoryCheckpoint
from tests.models.test_packed_checkpoints import GPTQ

# In 8 bits, and in groups: products of such weights round no activations on any processor.
EIGHT_BITS = GPTQ | {"bits": 8, "group_size": 16, "sym": False, "desc_act": True}
PROMPT = [5, 9, 2, 77]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def folders(tiny_model: Path, tmp_path: Path) -> dict[str, Path]:
    """The model packed, and the plain model of the same numbers."""
    config = json.loads((tiny_model / "config.json").read_text())
    plain = MemoryCheckpoint(config, load_file(tiny_model / "model.safetensors"))
    packer = packers.gptq(bits=8, group_size=16, symmetric=False, act_order=True)
    written = {}
    for name, checkpoint in zip(
        ("packed", "plain"), packers.packed(plain, packer, config=EIGHT_BITS), strict=True
    ):
        written[name] = shutil.copytree(tiny_model, tmp_path / name)
        (written[name] / "config.json").write_text(json.dumps(checkpoint.hf_config))
        tensors = {key: tensor.contiguous() for key, tensor in checkpoint.tensors.items()}
        save_file(tensors, written[name] / "model.safetensors", metadata={"format": "pt"})
    return written


async def answer(path: Path, **options: Any) -> tuple[list[int], str]:
    """Eight greedy tokens, and the metrics."""
    async with running_engine(path, dtype="float32", **options) as engine:
        collector = add(engine, "r", PROMPT, GREEDY)
        await ended(collector)
        return collector.token_ids[0], engine.metrics.render().decode()


def test_a_packed_folder_answers_as_its_plain_numbers_do(tiny_model: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        written = folders(tiny_model, tmp_path)
        tokens, metrics = await answer(written["packed"])
        expected, plain_metrics = await answer(written["plain"])
        assert tokens == expected and len(tokens) == 8
        form = "GPTQ, 8 bits in groups of 16, asymmetric, act-order"
        assert f'graphllm_model_info{{quantization="{form}"}} 1.0' in metrics
        assert 'graphllm_model_info{quantization="none"} 1.0' in plain_metrics

    asyncio.run(scenario())


def test_weights_are_rounded_where_the_flag_says_so(tiny_model: Path) -> None:
    async def scenario() -> None:
        tokens, metrics = await answer(tiny_model, quantization="int8")
        assert len(tokens) == 8 and 'quantization="int8"' in metrics

    asyncio.run(scenario())


def test_cached_prefixes_are_known_by_how_weights_are_stored(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks may outlive a process one day; those of other weights are then not this model's."""
    fingerprints: list[bytes] = []
    build = Scheduler.__init__

    def recording(self: Scheduler, *arguments: Any, **options: Any) -> None:
        fingerprints.append(options["kv_fingerprint"])
        build(self, *arguments, **options)

    monkeypatch.setattr(Scheduler, "__init__", recording)

    async def scenario() -> None:
        for quantization in (None, "int8", "int4"):
            async with running_engine(tiny_model, quantization=quantization):
                pass

    asyncio.run(scenario())
    assert len(set(fingerprints)) == 3


def test_a_contradiction_ends_the_start(tiny_model: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        packed = folders(tiny_model, tmp_path)["packed"]
        with pytest.raises(ConfigError, match="--quantization int4 contradicts the checkpoint"):
            await answer(packed, quantization="int4")

    asyncio.run(scenario())


def test_plain_numbers_differ_from_the_packed_ones_before_packing(tiny_model: Path, tmp_path: Path) -> None:
    """What the first test compares is not the model that packing began with."""
    tensors = load_file(folders(tiny_model, tmp_path)["plain"] / "model.safetensors")
    before = load_file(tiny_model / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(tensors[name], before[name])
