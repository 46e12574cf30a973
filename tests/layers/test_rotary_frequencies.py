from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from graphllm.arena import Arena
from graphllm.layers.rotary import (
    LinearRopeScaling,
    Llama3RopeScaling,
    RopeScaling,
    RotaryEmbedding,
    YarnRopeScaling,
    inverse_frequencies,
)

CONTEXT = 4096
CASES: list[tuple[dict[str, Any], RopeScaling | None]] = [
    ({"rope_type": "default"}, None),
    ({"rope_type": "linear", "factor": 4.0}, LinearRopeScaling(4.0)),
    (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
        Llama3RopeScaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=1024
        ),
    ),
    (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "attention_factor": 1.25,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        },
        YarnRopeScaling(
            factor=4.0,
            original_max_position_embeddings=1024,
            attention_factor=1.25,
            beta_fast=16.0,
            beta_slow=2.0,
        ),
    ),
]


def theirs(parameters: dict[str, Any], head_dim: int, theta: float) -> LlamaRotaryEmbedding:
    config = LlamaConfig(
        head_dim=head_dim,
        max_position_embeddings=CONTEXT,
        rope_parameters=parameters | {"rope_theta": theta},
    )
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize(("parameters", "scaling"), CASES)
@pytest.mark.parametrize("head_dim", [6, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_frequencies_are_those_of_transformers(
    parameters: dict[str, Any], scaling: RopeScaling | None, head_dim: int, theta: float
) -> None:
    found = inverse_frequencies(head_dim, theta, scaling=scaling)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, theirs(parameters, head_dim, theta).inv_freq, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(("parameters", "scaling"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_are_those_of_transformers_at_far_positions(
    parameters: dict[str, Any], scaling: RopeScaling | None, dtype: torch.dtype
) -> None:
    positions = torch.tensor([0, 1, 63, 1024, 4095])
    cpu = torch.device("cpu")
    rotary = RotaryEmbedding(64, 10000.0, scaling=scaling, device=cpu, dtype=dtype)
    cos, signed_sin = rotary(positions, arena=Arena(cpu))  # [5, 64] each
    their_cos, their_sin = theirs(parameters, 64, 10000.0)(torch.zeros(1, dtype=dtype), positions[None])
    tolerance = 2e-3 if dtype == torch.float32 else 1e-2
    assert cos.shape == (5, 64) and cos.dtype == dtype
    assert (cos - their_cos[0]).abs().max() < tolerance
    assert (signed_sin[:, 32:] - their_sin[0, :, 32:]).abs().max() < tolerance
    assert torch.equal(signed_sin[:, :32], -signed_sin[:, 32:])


def test_yarn_ramp_of_no_width_is_a_step() -> None:
    scaling = YarnRopeScaling(
        factor=4.0,
        original_max_position_embeddings=64,
        attention_factor=1.0,
        beta_fast=2.0,
        beta_slow=2.0,
        truncate=False,
    )
    ratios = inverse_frequencies(32, 100.0, scaling=scaling) / inverse_frequencies(32, 100.0, scaling=None)
    assert set(ratios.tolist()) == {1.0, 0.25}
