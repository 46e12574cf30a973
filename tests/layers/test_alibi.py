from __future__ import annotations

import pytest
import torch
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

from graphllm.layers.attention import alibi_slopes


@pytest.mark.parametrize("num_heads", [1, 2, 3, 8, 12, 32, 71])
def test_slopes_are_those_of_transformers_before_it_rounds_them(num_heads: int) -> None:
    mask = torch.ones(1, 2, dtype=torch.int64)
    theirs = build_alibi_tensor(mask, num_heads, dtype=torch.float32)[:, 0, 1]  # at position 1
    slopes = alibi_slopes(num_heads)
    assert slopes.shape == (num_heads,) and slopes.dtype == torch.float32
    torch.testing.assert_close(slopes, theirs, rtol=2**-8, atol=0.0)
    assert slopes.min() == 2**-8 or num_heads == 1


def test_a_power_of_two_heads_are_a_geometric_series() -> None:
    slopes = alibi_slopes(16)
    assert torch.equal(slopes[1::2], torch.exp2(-torch.arange(1.0, 9.0)))
    torch.testing.assert_close(slopes[1:] / slopes[:-1], torch.full((15,), 2**-0.5))
