"""LongRoPE's divisors are those of the longest context that is served, in every step alike."""

from __future__ import annotations

import pytest
import torch

from tests.models.equality import (
    TOLERANCE,
    assert_equal_in_a_mixed_batch,
    assert_equal_in_every_split,
    error,
    paged,
    prompt,
    theirs,
)
from tests.models.families import PHI3

ORIGINAL = 64
KEYS = {"original_max_position_embeddings": ORIGINAL}


def test_a_prompt_beyond_the_original_context_equals_transformers_in_chunks_too() -> None:
    assert_equal_in_every_split(PHI3.tiny("longrope", **KEYS))


@pytest.mark.parametrize("max_model_len", [ORIGINAL, 40])
def test_who_serves_the_original_context_alone_equals_transformers_there(max_model_len: int) -> None:
    model = PHI3.tiny("longrope", **KEYS)
    token_ids = prompt(40)
    ours = paged(model, max_model_len=max_model_len)
    logits = torch.cat([ours.step([(0, token_ids[start : start + 9])]) for start in range(0, 40, 9)])
    assert error(logits, theirs(model, token_ids)) < TOLERANCE


def test_short_contexts_differ_where_longer_ones_are_served() -> None:
    """What a request's tokens were turned by must not change when it grows."""
    model = PHI3.tiny("longrope", **KEYS)
    token_ids = prompt(40)
    assert error(paged(model).step([(0, token_ids)]), theirs(model, token_ids)) > TOLERANCE


def test_short_divisors_are_those_of_every_short_context() -> None:
    assert_equal_in_a_mixed_batch(PHI3.tiny("longrope", original_max_position_embeddings=512))
