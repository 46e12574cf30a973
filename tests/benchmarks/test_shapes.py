"""The published models' shapes: their parameters, and the bytes that a decode step must read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graphllm.cache.kv_cache import KVCacheShape
from graphllm.models.config import ModelConfig
from graphllm.models.dummy import DummyCheckpoint
from graphllm.models.registry import find_family, read_model_config
from graphllm.runner.memory_estimate import weight_bytes

SHAPES = Path(__file__).parents[2] / "benchmarks" / "shapes"
BYTES_PER_MILLISECOND = 3.0e9  # of an H100's copy bandwidth


def read(name: str) -> ModelConfig:
    checkpoint = DummyCheckpoint(SHAPES / f"{name}.json")
    return read_model_config(checkpoint, find_family(checkpoint))


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("llama-3.2-1b", 1_235_814_400),
        ("qwen3-0.6b", 596_049_920),
        ("llama-3.1-8b", 8_030_261_248),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("gpt-oss-20b", 20_914_757_184),
    ],
)
def test_a_shape_has_the_parameters_of_the_published_model(name: str, num_parameters: int) -> None:
    config = read(name)
    assert config.dtype == torch.bfloat16
    sinks = config.num_layers * config.num_heads * config.has_sinks  # in float32 whatever the rest is
    assert weight_bytes(config, torch.bfloat16).total == 2 * num_parameters + 2 * sinks


@pytest.mark.parametrize(
    ("name", "context", "batch", "milliseconds"),
    [
        ("llama-3.2-1b", 1024, 1, 0.84),
        ("llama-3.2-1b", 1024, 256, 3.69),
        ("llama-3.2-1b", 4096, 64, 3.69),
        ("qwen3-0.6b", 1024, 1, 0.44),
        ("qwen3-0.6b", 1024, 256, 10.4),
        ("llama-3.1-8b", 1024, 1, 5.05),
        ("llama-3.1-8b", 1024, 256, 16.5),
        ("llama-3.1-8b", 4096, 32, 10.7),
    ],
)
def test_a_decode_step_reads_the_bytes_of_its_known_floor(
    name: str, context: int, batch: int, milliseconds: float
) -> None:
    config = read(name)
    weights = weight_bytes(config, torch.bfloat16)
    # An embedding that is not the head as well is looked up by a few rows.
    read_weights = weights.total - (weights.embedding if weights.head else 0)
    kv = KVCacheShape(config.num_layers, config.num_kv_heads, config.head_dim, 16, torch.bfloat16)
    floor = (read_weights + batch * context * kv.bytes_per_token) / BYTES_PER_MILLISECOND
    assert floor == pytest.approx(milliseconds, rel=0.01)


def test_shapes_are_served_by_name_of_their_file() -> None:
    assert {path.stem for path in SHAPES.glob("*.json")} == {
        "llama-3.2-1b",
        "qwen3-0.6b",
        "llama-3.1-8b",
        "mixtral-8x7b",
        "qwen3-30b-a3b",
        "gpt-oss-20b",
    }
