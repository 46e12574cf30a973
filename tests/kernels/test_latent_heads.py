"""Heads from latents, and values out of heads: by reference here, by the kernels where they run."""

from __future__ import annotations

import math

import pytest
import torch

from graphllm.kernels.latent_heads import latent_heads, leading_dimensions
from tests.kernels.device import DEVICE

# Both by the reference and, in a process that interprets or on a card, by the kernel.
SIZES = [(1, 1, 2, 4, 3), (3, 4, 6, 10, 12), (2, 3, 8, 24, 32), (0, 2, 2, 2, 2)]


def heads_of(num_tokens: int, num_heads: int, num_turned: int, num_plain: int, value_dim: int) -> None:
    torch.manual_seed(0)
    head_dim = num_turned + num_plain
    query = torch.randn(num_tokens, num_heads, head_dim, device=DEVICE)
    key_value = torch.randn(num_tokens, num_heads, num_plain + value_dim, device=DEVICE)
    # The shared key stands behind something else.
    latents = torch.randn(num_tokens, 5 + num_turned, device=DEVICE)
    memory = torch.full((num_tokens + 2, 3 * num_heads, head_dim), math.nan, device=DEVICE)
    out = memory[1:-1]
    assert latent_heads(query, key_value, latents[:, 5:], out=out) is out
    assert memory[0].isnan().all() and memory[-1].isnan().all()
    for token in range(num_tokens):
        for head in range(num_heads):
            plain, turned = query[token, head].split((num_plain, num_turned))
            assert torch.equal(out[token, head], torch.cat((turned, plain)))
            plain, value = key_value[token, head].split((num_plain, value_dim))
            assert torch.equal(out[token, num_heads + head], torch.cat((latents[token, 5:], plain)))
            zeros = torch.zeros(head_dim - value_dim, device=DEVICE)
            assert torch.equal(out[token, 2 * num_heads + head], torch.cat((value, zeros)))


def leading_of(num_tokens: int, num_heads: int, head_dim: int, num_kept: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(num_tokens, num_heads, head_dim, device=DEVICE)
    memory = torch.full((num_tokens + 2, num_heads, num_kept), math.nan, device=DEVICE)
    out = memory[1:-1]
    assert leading_dimensions(x, out=out) is out
    assert torch.equal(out, x[..., :num_kept])
    assert memory[0].isnan().all() and memory[-1].isnan().all()


@pytest.mark.parametrize("sizes", SIZES)
def test_heads_are_put_together_by_reference(sizes: tuple[int, int, int, int, int]) -> None:
    heads_of(*sizes)


@pytest.mark.triton
@pytest.mark.parametrize("sizes", SIZES[:3])
def test_heads_are_put_together_by_the_kernel(sizes: tuple[int, int, int, int, int]) -> None:
    heads_of(*sizes)


@pytest.mark.parametrize("sizes", [(1, 1, 4, 3), (3, 2, 16, 16), (2, 5, 24, 16)])
def test_leading_dimensions_are_kept_by_reference(sizes: tuple[int, int, int, int]) -> None:
    leading_of(*sizes)


@pytest.mark.triton
@pytest.mark.parametrize("sizes", [(1, 1, 4, 3), (3, 2, 16, 16), (2, 5, 24, 16)])
def test_leading_dimensions_are_kept_by_the_kernel(sizes: tuple[int, int, int, int]) -> None:
    leading_of(*sizes)
