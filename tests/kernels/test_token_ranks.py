"""A token's rank counts the tokens that are likelier."""

from __future__ import annotations

import pytest
import torch

from graphllm.kernels.token_ranks import token_ranks_ref

_INFINITY = float("inf")


def ranks(rows: list[list[float]], token_ids: list[int]) -> list[int]:
    out = torch.zeros(len(rows), dtype=torch.int32)
    return token_ranks_ref(torch.tensor(rows), torch.tensor(token_ids), out=out).tolist()


def test_the_most_likely_token_has_rank_1_and_the_least_likely_the_last() -> None:
    row = [0.5, 3.0, -2.0, 1.0]
    assert ranks([row] * 4, [0, 1, 2, 3]) == [3, 1, 4, 2]


def test_equal_tokens_share_a_rank() -> None:
    assert ranks([[1.0, 2.0, 1.0, 2.0]] * 4, [0, 1, 2, 3]) == [3, 1, 3, 1]


def test_nan_is_the_least_likely_and_infinity_the_largest_number() -> None:
    row = [float("nan"), _INFINITY, torch.finfo(torch.float32).max, 0.0, -_INFINITY]
    assert ranks([row] * 5, [0, 1, 2, 3, 4]) == [4, 1, 1, 3, 4]


@pytest.mark.parametrize("vocab_size", [1, 1000])
def test_ranks_are_places_in_a_sort(vocab_size: int) -> None:
    logits = torch.randn(20, vocab_size, generator=torch.Generator().manual_seed(0))
    places = logits.argsort(1, descending=True).argsort(1) + 1
    token_ids = torch.randint(vocab_size, (20,), generator=torch.Generator().manual_seed(1))
    assert ranks(logits.tolist(), token_ids.tolist()) == places.gather(1, token_ids[:, None])[:, 0].tolist()
