"""The random numbers of kernels are those of the references: words bit for bit, noise to rounding."""

import pytest
import torch
import triton
import triton.language as tl

from graphllm.kernels.random_draws import (
    DrawKeys,
    DrawPurpose,
    draw_words,
    gumbel_noise_ref,
    tile_noise,
)
from graphllm.kernels.vocab_tiles import TILE_SIZE
from tests.kernels.device import DEVICE

pytestmark = pytest.mark.triton

_KEYS = [
    (0, 0, 0),
    (1, 0, 4095),
    (-0x0123_4567_89AB_CDEF, 5, 131_072),
    (2**63 - 1, 127, 1),
    (-(2**63), 3, 77),
    (0x7FFF_FFFF_0000_0001, 0, 2**31),
]


@triton.jit
def _words_kernel(keys, words, FIRST: tl.constexpr, COUNT: tl.constexpr, PURPOSE: tl.constexpr):
    row = tl.program_id(0)
    indices = tl.arange(0, COUNT)
    seed, sibling, position = (
        tl.load(keys + row * 3),
        tl.load(keys + row * 3 + 1),
        tl.load(keys + row * 3 + 2),
    )
    drawn = draw_words(seed, sibling, position, FIRST + indices, PURPOSE)
    for word in tl.static_range(4):
        tl.store(words + (row * 4 + word) * COUNT + indices, drawn[word].to(tl.int64))


@triton.jit
def _noise_kernel(keys, noise, first_tile, TILES: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0)
    seed, sibling, position = (
        tl.load(keys + row * 3),
        tl.load(keys + row * 3 + 1),
        tl.load(keys + row * 3 + 2),
    )
    values = tile_noise(seed, sibling, position, first_tile, TILES)
    tl.store(noise + row * TILES * TILE + tl.arange(0, TILES * TILE), values)


def _draw_keys(keys: list[tuple[int, int, int]]) -> DrawKeys:
    return DrawKeys(*torch.tensor(keys).unbind(1))


def _noise(keys: list[tuple[int, int, int]], first_tile: int, num_tiles: int) -> torch.Tensor:
    noise = torch.empty(len(keys), num_tiles * TILE_SIZE, device=DEVICE)
    _noise_kernel[(len(keys),)](
        torch.tensor(keys, device=DEVICE), noise, first_tile, TILES=num_tiles, TILE=TILE_SIZE
    )
    return noise.cpu()


@pytest.mark.parametrize("purpose", list(DrawPurpose))
def test_words_are_bit_equal_to_the_references(purpose: DrawPurpose) -> None:
    first, count = 37_000, 1024
    words = torch.empty(len(_KEYS), 4, count, dtype=torch.int64, device=DEVICE)
    _words_kernel[(len(_KEYS),)](
        torch.tensor(_KEYS, device=DEVICE), words, FIRST=first, COUNT=count, PURPOSE=int(purpose)
    )
    expected = _draw_keys(_KEYS).words(purpose, first + torch.arange(count)[None])
    assert torch.equal(words.cpu(), torch.stack(expected, dim=1))


@pytest.mark.parametrize("first_tile", [0, 1000])
def test_noise_is_the_references_to_rounding(first_tile: int) -> None:
    noise = _noise(_KEYS, first_tile, 32)
    ids = first_tile * TILE_SIZE + torch.arange(32 * TILE_SIZE)
    expected = gumbel_noise_ref(_draw_keys(_KEYS), ids[None])
    torch.testing.assert_close(noise, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_thousands_of_draws_have_the_references_winners(spread: float) -> None:
    # Every tile is a draw from a vocabulary of 64.
    keys = [(seed, seed % 5, 1000 + seed) for seed in range(40)]
    logits = spread * torch.randn(40, 64, TILE_SIZE, generator=torch.Generator().manual_seed(3))
    found = logits + _noise(keys, 0, 64).view(logits.shape)
    expected = logits + gumbel_noise_ref(_draw_keys(keys), torch.arange(64 * TILE_SIZE)[None]).view(
        logits.shape
    )
    best = expected.topk(2, dim=2).values
    differ = found.argmax(2) != expected.argmax(2)
    assert int(differ.sum()) <= 1  # of 2,560
    assert (best[..., 0] - best[..., 1])[differ].lt(1e-5).all()
