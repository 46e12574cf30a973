"""The kernel of token ranks against its reference, on rows of one chunk, of several, of no whole number."""

from __future__ import annotations

import pytest
import torch

from graphllm.kernels.token_ranks import token_ranks, token_ranks_ref
from graphllm.kernels.vocab_tiles import CHUNK_SIZE
from tests.kernels.device import DEVICE

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("vocab_size", [1, 7, CHUNK_SIZE, CHUNK_SIZE + 1, 3 * CHUNK_SIZE - 5])
def test_ranks_equal_the_reference(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    # Few different values, so that many are equal; and what is no number.
    logits = torch.randint(-40, 40, (9, vocab_size), generator=generator).float() / 8
    logits[2, ::3] = float("nan")
    logits[3, ::2] = float("inf")
    logits[4] = -float("inf")
    logits[5, -1] = torch.finfo(torch.float32).max
    token_ids = torch.randint(vocab_size, (9,), generator=generator)
    token_ids[5:7] = torch.tensor([vocab_size - 1, 0])
    expected = token_ranks_ref(logits, token_ids, out=torch.zeros(9, dtype=torch.int32))
    found = torch.full((9,), -1, dtype=torch.int32, device=DEVICE)
    assert token_ranks(logits.to(DEVICE), token_ids.to(DEVICE), out=found) is found
    assert found.tolist() == expected.tolist()
