"""Prompt logprobs are a sequence of entries that exist only while somebody looks at them."""

from __future__ import annotations

from array import array

import pytest

from graphllm.outputs import PromptLogprobs, PromptScores, TokenLogprob


def scores(first: int, count: int, num_top: int) -> PromptScores:
    """Numbers that say which token they are of."""
    numbers = range(first, first + count)
    return PromptScores(
        array("f", [-float(number) for number in numbers]),
        array("i", [10 * number for number in numbers]),
        array("i", [100 * number + rank for number in numbers for rank in range(num_top)]),
        array("f", [-float(number) - rank for number in numbers for rank in range(num_top)]),
    )


def filled(num_top: int) -> PromptLogprobs:
    found = PromptLogprobs([7, 8, 9, 6, 5], num_top)
    found.append(scores(1, 3, num_top))
    found.append(scores(4, 1, num_top))
    return found


def test_entries_are_in_the_prompts_order_and_the_first_is_none() -> None:
    found = filled(2)
    assert len(found) == 5 and found.num_scored == 4
    assert found[0] is None
    assert found[3] == TokenLogprob(6, -3.0, ((300, -3.0), (301, -4.0)), 30)
    assert found[-1] == found[4] == TokenLogprob(5, -4.0, ((400, -4.0), (401, -5.0)), 40)
    assert list(found) == [found[index] for index in range(5)] == found[:]
    assert found[1:4:2] == [found[1], found[3]]
    with pytest.raises(IndexError):
        found[5]


def test_without_alternatives_the_token_itself_is_scored() -> None:
    assert filled(0)[2] == TokenLogprob(9, -2.0, (), 20)


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    assert list(PromptLogprobs([3], 5)) == [None]


def test_more_scores_than_tokens_are_a_defect() -> None:
    found = filled(1)
    with pytest.raises(AssertionError, match="no more"):
        found.append(scores(5, 1, 1))


def test_scores_with_another_number_of_alternatives_are_a_defect() -> None:
    with pytest.raises(AssertionError, match="as many alternatives"):
        PromptLogprobs([1, 2, 3], 2).append(scores(1, 2, 1))
