from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from graphllm.arena import Arena
from graphllm.layers.rotary import (
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    ProportionalRopeScaling,
    RopeScaling,
    RotaryConfig,
    RotaryEmbedding,
    YarnRopeScaling,
    rotary_frequencies,
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
    (
        {"rope_type": "proportional", "partial_rotary_factor": 0.75, "factor": 2.0},
        ProportionalRopeScaling(turned_fraction=0.75, factor=2.0),
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
    rotary = RotaryConfig(rotary_dim=head_dim, theta=theta, scaling=scaling)
    found = rotary_frequencies(rotary, max_context=CONTEXT)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, theirs(parameters, head_dim, theta).inv_freq, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(("parameters", "scaling"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_are_those_of_transformers_at_far_positions(
    parameters: dict[str, Any], scaling: RopeScaling | None, dtype: torch.dtype
) -> None:
    positions = torch.tensor([0, 1, 63, 1024, 4095])
    cpu = torch.device("cpu")
    config = RotaryConfig(rotary_dim=64, theta=10000.0, scaling=scaling)
    rotary = RotaryEmbedding(config, max_context=CONTEXT, device=cpu, dtype=dtype)
    cos, signed_sin = rotary(positions, arena=Arena(cpu), name="rotary")  # [5, 64] each
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
    stretched, plain = (
        rotary_frequencies(RotaryConfig(rotary_dim=32, theta=100.0, scaling=way), max_context=CONTEXT)
        for way in (scaling, None)
    )
    ratios = stretched / plain
    assert set(ratios.tolist()) == {1.0, 0.25}


@pytest.mark.parametrize(("max_context", "is_long"), [(64, False), (65, True)])
def test_the_longest_context_that_is_served_chooses_the_divisors(max_context: int, is_long: bool) -> None:
    parameters = {
        "rope_type": "longrope",
        "short_factor": [1.0 + pair / 8 for pair in range(8)],
        "long_factor": [2.0 + pair for pair in range(8)],
        "original_max_position_embeddings": 64,
    }
    scaling = LongRopeScaling(
        short_factors=tuple(parameters["short_factor"]),
        long_factors=tuple(parameters["long_factor"]),
        original_max_position_embeddings=64,
        attention_factor=(1 + math.log(CONTEXT / 64) / math.log(64)) ** 0.5,
    )
    config = RotaryConfig(rotary_dim=16, theta=10000.0, scaling=scaling)
    cpu = torch.device("cpu")
    rotary = RotaryEmbedding(config, max_context=max_context, device=cpu, dtype=torch.float32)
    positions = torch.arange(max_context)
    cos, signed_sin = rotary(positions, arena=Arena(cpu), name="rotary")
    their_cos, their_sin = theirs(parameters, 16, 10000.0)(torch.zeros(1), positions[None])
    torch.testing.assert_close(cos, their_cos[0], rtol=0.0, atol=1e-5)
    torch.testing.assert_close(signed_sin[:, 8:], their_sin[0, :, 8:], rtol=0.0, atol=1e-5)
    assert rotary_frequencies(config, max_context=max_context)[0] == (0.5 if is_long else 1.0)
