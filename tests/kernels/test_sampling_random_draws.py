"""Random numbers and the Gumbel draw: known answers, distributions, and what they depend on."""

import math

import pytest
import torch

from graphllm.kernels.gumbel_draw import gumbel_draw_ref
from graphllm.kernels.random_draws import (
    NOISE_MAX,
    NOISE_MIN,
    DrawKeys,
    DrawPurpose,
    exponential_ref,
    gumbel_noise_ref,
    philox4x32_ref,
    tile_minima_ref,
)
from graphllm.kernels.vocab_tiles import TILE_SIZE

_ONES = 0xFFFFFFFF


def _keys(num_rows: int, *, seed: int = 0, sibling: int = 0, first_position: int = 0) -> DrawKeys:
    return DrawKeys(
        torch.full((num_rows,), seed),
        torch.full((num_rows,), sibling),
        first_position + torch.arange(num_rows),
    )


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((_ONES,) * 4, (_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    words = philox4x32_ref(
        tuple(torch.tensor([word]) for word in counter), tuple(torch.tensor([word]) for word in key)
    )
    assert tuple(int(word) for word in words) == expected


def test_draw_keys_put_seed_and_counter_where_the_docstring_says() -> None:
    seed = -0x0123_4567_89AB_CDEF
    keys = DrawKeys(torch.tensor([seed]), torch.tensor([5]), torch.tensor([1234]))
    found = keys.words(DrawPurpose.TOKEN, torch.tensor([[77]]))
    counter = tuple(torch.tensor([word]) for word in (1, 77, 1234, 5))
    key = (torch.tensor([seed & _ONES]), torch.tensor([(seed >> 32) & _ONES]))
    assert [int(word) for word in found] == [int(word) for word in philox4x32_ref(counter, key)]


def test_uniforms_stay_inside_the_open_interval() -> None:
    words = torch.tensor([0, 1, _ONES // 2, _ONES - 1, _ONES])
    exponentials = exponential_ref(words)
    assert float(exponentials[0]) == pytest.approx(2.0**-33, rel=1e-6)
    assert float(exponentials[1]) == pytest.approx(1.5 * 2.0**-32, rel=1e-6)
    assert float(exponentials[2]) == pytest.approx(math.log(2), rel=1e-6)
    assert float(exponentials[-1]) == pytest.approx(24 * math.log(2), rel=1e-6)
    assert (exponentials[1:] >= exponentials[:-1]).all() and exponentials.isfinite().all()


def test_noise_cannot_leave_its_documented_range() -> None:
    smallest, largest = exponential_ref(torch.tensor([0, _ONES])).tolist()
    assert -math.log(smallest / TILE_SIZE) < NOISE_MAX < -math.log(smallest / TILE_SIZE) + 0.01
    assert (
        -math.log(largest / TILE_SIZE + largest) > NOISE_MIN > -math.log(largest / TILE_SIZE + largest) - 0.01
    )


def test_noise_of_each_token_is_gumbel() -> None:
    # Kolmogorov-Smirnov, for single tokens at the ends and in the middle of tiles, and for all together.
    num_rows = 4000
    noise = gumbel_noise_ref(_keys(num_rows, seed=11), torch.tensor([[0, 1, 31, 63, 64, 127, 49151]]))
    samples = [*noise.double().unbind(1), noise.double().flatten()]
    for sample in samples:
        cdf = torch.exp(-torch.exp(-sample.sort().values))
        n = sample.numel()
        steps = torch.arange(n + 1, dtype=torch.float64) / n
        distance = torch.maximum((cdf - steps[:-1]).abs().max(), (cdf - steps[1:]).abs().max())
        assert float(distance) * math.sqrt(n) < 2.23  # p = 1e-4


def test_noise_of_neighbours_in_a_tile_is_independent() -> None:
    # The tokens of a tile share its smallest exponential, which must leave no trace.
    num_rows = 20_000
    noise = gumbel_noise_ref(_keys(num_rows, seed=3), torch.tensor([[0, 1, 2, 5, 63, 64]]))
    ranks = noise.argsort(0).argsort(0).double()
    correlations = torch.corrcoef(ranks.t())
    off_diagonal = correlations[~torch.eye(6, dtype=torch.bool)]
    assert float(off_diagonal.abs().max()) * math.sqrt(num_rows) < 4.5
    # Extremes together: both in their upper tenth as often as independence has it.
    high = (ranks >= 0.9 * num_rows).double()
    together = (high.t() @ high)[~torch.eye(6, dtype=torch.bool)]
    expected, deviation = 0.01 * num_rows, math.sqrt(0.01 * 0.99 * num_rows)
    assert float((together - expected).abs().max()) < 4.5 * deviation


def test_noise_of_a_token_depends_on_nothing_but_its_key_and_id() -> None:
    keys = _keys(7, seed=99)
    together = gumbel_noise_ref(keys, torch.arange(300)[None])
    picked = torch.tensor([299, 0, 77])
    apart = gumbel_noise_ref(keys.select(torch.tensor([5, 2])), picked[None])
    assert torch.equal(apart, together[[5, 2]][:, picked])


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(_keys(64, seed=1 + 2**32), id="seed-high-word"),
        pytest.param(_keys(64, seed=0), id="seed-low-word"),
        pytest.param(_keys(64, seed=1, sibling=1), id="sibling"),
        pytest.param(_keys(64, seed=1, first_position=64), id="position"),
    ],
)
def test_seed_sibling_and_position_each_change_all_noise(other: DrawKeys) -> None:
    token_ids = torch.arange(64)[None]
    noise = gumbel_noise_ref(_keys(64, seed=1), token_ids)
    other_noise = gumbel_noise_ref(other, token_ids)
    assert not (noise == other_noise).any()
    pair = torch.stack((noise.flatten(), other_noise.flatten())).double()
    assert float(torch.corrcoef(pair)[0, 1]) < 4.5 / 64


def test_every_lane_of_a_tile_holds_the_smallest_exponential_equally_often() -> None:
    _, owners = tile_minima_ref(_keys(500), torch.arange(100)[None])
    counts = torch.bincount(owners.flatten(), minlength=TILE_SIZE).double()
    expected = counts.sum() / TILE_SIZE
    assert counts.numel() == TILE_SIZE
    assert float(((counts - expected) ** 2 / expected).sum()) < 114.0  # 63 degrees of freedom, p = 1e-4


@pytest.mark.parametrize("vocab_size", [1, 2, 63, 64, 65, 1000, 49_152])
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
def test_draw_is_the_argmax_over_all_tokens(vocab_size: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = spread * torch.randn(12, vocab_size, generator=generator)
    logits[3:6][torch.rand(3, vocab_size, generator=generator) < 0.7] = float("-inf")
    logits[3:6, vocab_size // 2] = 0.0
    keys = _keys(12, seed=vocab_size)
    values = logits + gumbel_noise_ref(keys, torch.arange(vocab_size)[None])
    assert gumbel_draw_ref(logits, keys).tolist() == values.argmax(1).tolist()


def test_draw_keeps_its_winner_when_others_are_filtered_out() -> None:
    logits = 2.0 * torch.randn(200, 500, generator=torch.Generator().manual_seed(0))
    keys = _keys(200, seed=8)
    winners = gumbel_draw_ref(logits, keys)
    filtered = logits.masked_fill(
        torch.rand(200, 500, generator=torch.Generator().manual_seed(1)) < 0.9, -1e9
    )
    filtered = filtered.masked_fill(filtered == -1e9, float("-inf"))
    filtered.scatter_(1, winners[:, None], logits.gather(1, winners[:, None]))
    assert torch.equal(gumbel_draw_ref(filtered, keys), winners)


def test_draw_from_a_row_of_minus_infinity_gives_token_zero() -> None:
    logits = torch.full((3, 130), float("-inf"))
    logits[1, 129] = -3.0
    assert gumbel_draw_ref(logits, _keys(3)).tolist() == [0, 129, 0]
