"""top_k, top_p and min_p, against a naive sorted implementation and transformers' warpers."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from graphllm.kernels.token_filters import TokenFilters, filter_tokens_ref


def _filters(top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, *, num_rows: int = 1) -> TokenFilters:
    return TokenFilters(
        torch.full((num_rows,), top_k), torch.full((num_rows,), top_p), torch.full((num_rows,), min_p)
    )


def _kept(logits: torch.Tensor, filters: TokenFilters) -> list[set[int]]:
    """The tokens kept in each row; what is kept must keep its value."""
    filtered = logits.clone()
    filter_tokens_ref(filtered, filters)
    is_kept = filtered > float("-inf")
    assert torch.equal(filtered[is_kept], logits[is_kept])
    return [set(row.nonzero()[:, 0].tolist()) for row in is_kept]


def _naive_kept(logits: list[float], *, top_k: int, top_p: float, min_p: float) -> tuple[set[int], float]:
    """The definition, token by token in float64; and how near the nearest decision was."""
    order = sorted((i for i in range(len(logits)) if logits[i] > -math.inf), key=lambda i: (-logits[i], i))
    masses = {i: math.exp(logits[i] - logits[order[0]]) for i in order}
    if top_k > 0:
        order = order[:top_k]
    total, before, margin = sum(masses[i] for i in order), 0.0, 1.0
    kept = set()
    for rank, i in enumerate(order):
        if rank:
            margin = min(margin, abs(before / total - top_p) if top_p < 1 else 1.0, abs(masses[i] - min_p))
            if (top_p < 1 and before / total >= top_p) or masses[i] < min_p:
                break
        kept.add(i)
        before += masses[i]
    return kept, margin


@settings(max_examples=300, deadline=None)
@given(
    logits=st.lists(
        st.one_of(st.integers(-6, 6).map(float), st.floats(-8, 8, width=32), st.just(-math.inf)),
        min_size=1,
        max_size=60,
    ),
    top_k=st.integers(0, 62),
    top_p=st.one_of(st.just(1.0), st.floats(1 / 128, 127 / 128, width=32)),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0, width=32)),
)
def test_kept_set_equals_that_of_a_naive_sorted_implementation(
    logits: list[float], top_k: int, top_p: float, min_p: float
) -> None:
    assume(max(logits) > -math.inf)
    expected, margin = _naive_kept(logits, top_k=top_k, top_p=top_p, min_p=min_p)
    assume(margin > 1e-5)
    assert _kept(torch.tensor([logits]), _filters(top_k, top_p, min_p)) == [expected]


@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (0, 0.9, 0.0),
        (0, 0.999, 0.0),
        (0, 0.3, 0.0),
        (50, 1.0, 0.0),
        (127, 1.0, 0.0),
        (128, 1.0, 0.0),
        (129, 0.9, 0.0),
        (3000, 1.0, 0.0),
        (3000, 0.9, 0.0),
        (3000, 0.9, 0.2),
        (3000, 1.0, 0.2),
        (0, 1.0, 0.1),
        (0, 1.0, 1e-5),
        (0, 0.95, 0.05),
        (5999, 1.0, 0.0),
    ],
)
def test_kept_set_is_right_however_far_it_reaches(
    spread: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = spread * torch.randn(3, 6000, generator=torch.Generator().manual_seed(5))
    logits[2] = logits[2].mul(4).round().div(4)
    found = _kept(logits, _filters(top_k, top_p, min_p, num_rows=3))
    for row, kept in zip(logits.tolist(), found, strict=True):
        expected, margin = _naive_kept(row, top_k=top_k, top_p=top_p, min_p=min_p)
        # Over thousands of tokens some cumulative mass lies near the limit: allow that one to differ.
        assert len(kept ^ expected) <= (0 if margin > 1e-5 else 1)


def test_top_k_keeps_exactly_k_of_tied_tokens_the_lowest_ids() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 1.0], [0.0] * 6, [5.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert _kept(logits, _filters(3, num_rows=3)) == [{0, 1, 3}, {0, 1, 2}, {0, 1, 2}]


def test_top_k_ties_are_cut_by_id_across_the_whole_vocabulary() -> None:
    assert _kept(torch.zeros(1, 1000), _filters(7)) == [set(range(7))]
    assert _kept(torch.zeros(1, 1000), _filters(700)) == [set(range(700))]


def test_top_p_keeps_the_token_that_crosses_and_stops_where_the_mass_is_reached() -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    for top_p, kept in [(0.3, {0}), (0.5, {0}), (0.51, {0, 1}), (0.75, {0, 1}), (0.76, {0, 1, 2})]:
        assert _kept(probabilities.log(), _filters(top_p=top_p)) == [kept]


def test_top_p_of_a_flat_row_counts_tokens() -> None:
    assert _kept(torch.zeros(1, 8), _filters(top_p=0.5)) == [set(range(4))]
    assert _kept(torch.zeros(1, 1024), _filters(top_p=0.75)) == [set(range(768))]


def test_top_p_is_a_share_of_the_top_k_set() -> None:
    # Of the three best (.4 .3 .2), renormalised .44 .33 .22: two reach 0.7; of the whole, three would.
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert _kept(logits, _filters(3, 0.75)) == [{0, 1}]
    assert _kept(logits, _filters(0, 0.75)) == [{0, 1, 2}]


def test_top_p_share_of_a_long_top_k_set_ignores_what_min_p_removes() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 300:] = -5.0
    expected, _ = _naive_kept(logits[0].tolist(), top_k=600, top_p=0.5, min_p=0.1)
    assert _kept(logits, _filters(600, 0.5, 0.1)) == [expected]
    assert len(expected) == 152  # half of 300 + 300 exp(-5)


def test_min_p_of_one_keeps_what_ties_with_the_best() -> None:
    assert _kept(torch.tensor([[3.0, 1.0, 3.0]]), _filters(min_p=1.0)) == [{0, 2}]


def test_smallest_top_p_keeps_the_best_token() -> None:
    assert _kept(torch.tensor([[0.0, 1.0, 0.0]]), _filters(top_p=1e-38)) == [{1}]


def test_masked_tokens_are_never_kept() -> None:
    logits = torch.full((1, 500), float("-inf"))
    logits[0, [7, 450]] = torch.tensor([0.0, 1.0])
    for filters in (_filters(100), _filters(400), _filters(top_p=0.999), _filters(min_p=1e-9)):
        assert _kept(logits, filters) == [{7, 450}]


def test_row_without_filters_is_left_alone_between_rows_with_them() -> None:
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(2))
    filters = TokenFilters(torch.tensor([5, 0, 0]), torch.tensor([1.0, 1.0, 0.2]), torch.zeros(3))
    found = _kept(logits, filters)
    assert len(found[0]) == 5 and len(found[1]) == 300 and len(found[2]) < 100
    alone = [_kept(logits[row : row + 1], filters.select(torch.tensor([row])))[0] for row in range(3)]
    assert found == alone


@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_kept_sets_equal_those_of_transformers(spread: float) -> None:
    logits = spread * torch.randn(20, 400, generator=torch.Generator().manual_seed(7))
    no_ids = torch.zeros(20, 1, dtype=torch.int64)
    for warper, filters in [
        (TopKLogitsWarper(20), _filters(20, num_rows=20)),
        (TopPLogitsWarper(0.8), _filters(top_p=0.8, num_rows=20)),
        (MinPLogitsWarper(0.1), _filters(min_p=0.1, num_rows=20)),
    ]:
        expected = warper(no_ids, logits.clone()) > float("-inf")
        filtered = logits.clone()
        filter_tokens_ref(filtered, filters)
        assert torch.equal(filtered > float("-inf"), expected)
