"""The greedy choice and the total order of tokens, against plain sorting."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphllm.kernels.argmax import argmax_ref
from graphllm.kernels.top_tokens import sort_tokens_ref, top_tokens_ref

_INFINITY = float("inf")


def _sorted_ids(row: torch.Tensor) -> list[int]:
    return sorted(range(row.numel()), key=lambda token_id: (-float(row[token_id]), token_id))


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(
        st.sampled_from([-_INFINITY, -3.4e38, -2.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 1.5, 3.4e38]),
        min_size=1,
        max_size=70,
    ),
    data=st.data(),
)
def test_top_tokens_are_the_first_of_a_sort_with_ties_by_id(values: list[float], data: st.DataObject) -> None:
    row = torch.tensor([values])
    k = data.draw(st.integers(0, len(values)))
    expected = _sorted_ids(row[0])[:k]
    top_logits, top_ids = top_tokens_ref(row, k)
    assert top_ids[0].tolist() == expected
    assert torch.equal(top_logits[0], row[0, expected])
    shuffled = torch.tensor([data.draw(st.permutations(range(len(values))))])
    sorted_logits, sorted_ids = sort_tokens_ref(row.gather(1, shuffled), shuffled)
    assert sorted_ids[0].tolist() == _sorted_ids(row[0])
    assert torch.equal(sorted_logits, row.gather(1, sorted_ids))


@pytest.mark.parametrize("vocab_size", [640, 1000, 5000])
@pytest.mark.parametrize("k", [1, 4, 5, 20, 39, 128])
def test_top_tokens_of_a_large_vocabulary_survive_the_search_by_tiles(vocab_size: int, k: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size + k)
    logits = torch.randn(6, vocab_size, generator=generator)
    logits[1:3] = logits[1:3].mul(2).round()  # hundreds of ties, across tiles
    logits[3] = 0.0
    logits[4, 70:] = -_INFINITY
    _, top_ids = top_tokens_ref(logits, k)
    for row, ids in zip(logits, top_ids, strict=True):
        assert ids.tolist() == _sorted_ids(row)[:k]


@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65, 1000])
def test_argmax_takes_the_lowest_of_equal_tokens(vocab_size: int) -> None:
    logits = torch.randn(50, vocab_size, generator=torch.Generator().manual_seed(1)).mul(2).round()
    logits[0] = -_INFINITY
    logits[1] = 0.0
    expected = [_sorted_ids(row)[0] for row in logits]
    assert argmax_ref(logits).tolist() == expected
    assert expected[:2] == [0, 0]
