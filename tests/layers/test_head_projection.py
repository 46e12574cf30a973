"""The matrices between a latent and its heads: their place in a checkpoint, and what they amount to."""

from __future__ import annotations

import torch

from graphllm.layers.head_projection import HeadProjection

NUM_HEADS, RANK, KEY_DIM, VALUE_DIM = 3, 8, 5, 7


def loaded(stored: torch.Tensor) -> HeadProjection:
    projection = HeadProjection(
        RANK,
        NUM_HEADS,
        key_dim=KEY_DIM,
        value_dim=VALUE_DIM,
        device=torch.device("cpu"),
        dtype=torch.float64,
    )
    slots = projection.weight_slots()
    assert list(slots) == list(projection.whole_slots()) == ["weight"]
    assert slots["weight"].shape == stored.shape
    slots["weight"].load(stored)
    return projection


def test_queries_meet_latents_as_they_would_meet_spelled_out_keys() -> None:
    torch.manual_seed(0)
    stored = torch.randn(NUM_HEADS * (KEY_DIM + VALUE_DIM), RANK, dtype=torch.float64)
    query, latent = torch.randn(4, NUM_HEADS, KEY_DIM).double(), torch.randn(RANK).double()
    key = (stored @ latent).view(NUM_HEADS, -1)[:, :KEY_DIM]
    # Parts of wider tensors, as the layer has them.
    wider, memory = (
        torch.zeros(4, NUM_HEADS, KEY_DIM + 2).double(),
        torch.full((4, NUM_HEADS, 11), 7.0).double(),
    )
    wider[..., :KEY_DIM] = query
    loaded(stored).to_latent(wider[..., :KEY_DIM], out=memory[..., :RANK])
    torch.testing.assert_close(memory[..., :RANK] @ latent, (query * key).sum(-1))
    assert (memory[..., RANK:] == 7.0).all()


def test_sums_of_latents_become_sums_of_values() -> None:
    torch.manual_seed(0)
    stored = torch.randn(NUM_HEADS * (KEY_DIM + VALUE_DIM), RANK, dtype=torch.float64)
    latents, weights = torch.randn(6, RANK).double(), torch.rand(4, NUM_HEADS, 6).double()
    values = (latents @ stored.T).view(6, NUM_HEADS, -1)[..., KEY_DIM:]
    out = torch.empty(4, NUM_HEADS, VALUE_DIM, dtype=torch.float64)
    loaded(stored).to_values(weights @ latents, out=out)
    torch.testing.assert_close(out, torch.einsum("qhk,khd->qhd", weights, values))
