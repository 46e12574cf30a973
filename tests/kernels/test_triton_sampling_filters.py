"""top_k, top_p and min_p by thresholds keep what the references keep."""

import math

import pytest
import torch

from graphllm.kernels.filter_thresholds import NUM_CANDIDATES, filter_thresholds
from graphllm.kernels.row_maxima import row_maxima
from graphllm.kernels.sampled_rows import FloatColumn, IntColumn
from graphllm.kernels.token_filters import TokenFilters, filter_tokens_ref
from graphllm.kernels.vocab_tiles import num_tiles
from tests.kernels.device import DEVICE
from tests.kernels.sampling_rows import empty_maxima, make_rows, unadjusted

pytestmark = pytest.mark.triton

_INFINITY = float("inf")

_Filter = tuple[int, float, float]

_FILTERS: list[_Filter] = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (20, 0.95, 0.0),
    (50, 1.0, 0.0),
    (50, 0.5, 0.1),
    (400, 0.9, 0.0),
    (400, 0.9, 0.02),
    (0, 0.9, 0.0),
    (0, 0.999, 0.0),
    (0, 0.3, 0.05),
    (0, 1.0, 0.1),
    (0, 1.0, 1e-5),
    (0, 1.0, 1.0),
    (0, 1e-38, 0.0),
    (3, 0.99, 0.3),
]


def _kept(logits: torch.Tensor, filters: list[_Filter], temperatures: list[float]) -> torch.Tensor:
    """Which tokens the kernel keeps: [num_rows, vocab] bool."""
    num_rows, vocab_size = logits.shape
    rows = make_rows(
        num_rows,
        float_columns={
            FloatColumn.TEMPERATURE: temperatures,
            FloatColumn.TOP_P: [top_p for _, top_p, _ in filters],
            FloatColumn.MIN_P: [min_p for _, _, min_p in filters],
        },
        int_columns={IntColumn.TOP_K: [top_k for top_k, _, _ in filters]},
    )
    adjusted = unadjusted(logits)
    thresholds = filter_thresholds(
        adjusted,
        rows,
        row_maxima(adjusted, rows, out=empty_maxima(num_rows, vocab_size)),
        tile_lists=torch.empty(num_rows, num_tiles(vocab_size), dtype=torch.int32, device=DEVICE),
        candidates=torch.empty(num_rows, NUM_CANDIDATES, dtype=torch.int32, device=DEVICE),
        out=torch.empty(num_rows, 2, dtype=torch.int32, device=DEVICE),
    ).cpu()
    bits = (_tempered(logits, temperatures) + 0.0).view(torch.int32)
    orders = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    is_tie = orders == thresholds[:, :1]
    return (orders > thresholds[:, :1]) | (is_tie & (torch.arange(vocab_size) <= thresholds[:, 1:]))


def _tempered(logits: torch.Tensor, temperatures: list[float]) -> torch.Tensor:
    return (logits - logits.amax(1, keepdim=True)) / torch.tensor(temperatures)[:, None]


def _kept_ref(logits: torch.Tensor, filters: list[_Filter], temperatures: list[float]) -> torch.Tensor:
    filtered = _tempered(logits, temperatures)
    top_k, top_p, min_p = (torch.tensor(values) for values in zip(*filters, strict=True))
    filter_tokens_ref(filtered, TokenFilters(top_k, top_p, min_p))
    return filtered > -_INFINITY


def _check(logits: torch.Tensor, filters: list[_Filter], temperatures: list[float] | None = None) -> None:
    temperatures = temperatures or [1.0] * len(filters)
    found = _kept(logits, filters, temperatures)
    expected = _kept_ref(logits, filters, temperatures)
    found &= logits > -_INFINITY  # those are never drawn, kept or not
    differing = (found != expected).sum(1)
    for row, (top_k, top_p, min_p) in enumerate(filters):
        # Where thousands of masses are added, one token may lie within rounding of the limit.
        limit = 1 if top_p < 1.0 and int(expected[row].sum()) > 100 else 0
        assert int(differing[row]) <= limit, (row, top_k, top_p, min_p, int(differing[row]))


@pytest.mark.parametrize("vocab_size", [515, 2000])
def test_kept_tokens_are_the_references(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = 3 * torch.randn(len(_FILTERS), vocab_size, generator=generator)
    _check(logits, _FILTERS, [(1.0, 0.6, 1.7)[row % 3] for row in range(len(_FILTERS))])


def test_kept_tokens_are_the_references_among_ties() -> None:
    logits = torch.randn(len(_FILTERS), 700, generator=torch.Generator().manual_seed(5)).mul(2).round()
    logits[:, ::3] = -_INFINITY
    _check(logits, _FILTERS)


@pytest.mark.parametrize("spread", [0.02, 1.0, 3.0])
def test_kept_tokens_are_the_references_where_registers_do_not_hold_them(spread: float) -> None:
    filters = [(0, 0.95, 0.0), (0, 0.5, 0.0), (6000, 1.0, 0.0), (6000, 0.9, 0.0), (5, 1.0, 0.0)]
    logits = spread * torch.randn(5, 9000, generator=torch.Generator().manual_seed(7))
    _check(logits, filters)


def test_ties_of_a_flat_row_are_cut_by_id() -> None:
    logits = torch.zeros(4, 9000)
    found = _kept(logits, [(7, 1.0, 0.0), (8000, 1.0, 0.0), (0, 0.5, 0.0), (4000, 0.25, 0.0)], [1.0] * 4)
    for row, count in enumerate([7, 8000, 4500, 1000]):
        assert found[row].nonzero()[:, 0].tolist() == list(range(count))


def test_ties_below_the_best_are_cut_by_id() -> None:
    logits = torch.full((2, 600), -1.0)
    logits[:, [100, 500]] = 3.0
    found = _kept(logits, [(9, 1.0, 0.0), (0, 0.25, 0.0)], [1.0, 1.0])
    assert found[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 100, 500]
    # The two best have 2 of 2 + 598 exp(-4) = 12.95; 0.25 of that is 3.24, and each other has 0.0183.
    missing = math.ceil((0.25 * (2 + 598 * math.exp(-4)) - 2) / math.exp(-4))
    assert found[1].nonzero()[:, 0].tolist() == [*range(missing), 100, 500]


def test_rows_without_filters_keep_everything() -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    logits[2] = -_INFINITY
    filters = [(0, 1.0, 0.0), (300, 1.0, 0.0), (5, 0.5, 0.5), (5, 0.5, 0.5)]
    found = _kept(logits, filters, [1.0, 1.0, 1.0, 0.0])  # nothing to keep; greedy
    assert found[:2].all() and (found[3] | logits[3].isnan()).all()


def test_far_and_tiny_differences_are_told_apart() -> None:
    logits = torch.zeros(3, 300)
    logits[0] = -1e30 * torch.arange(300).flip(0)
    logits[1] = -1e-30 * torch.arange(300).flip(0)
    logits[2] = -3e37 * (torch.arange(300) % 11)
    _check(logits, [(5, 1.0, 0.0), (5, 1.0, 0.0), (100, 1.0, 0.0)])
