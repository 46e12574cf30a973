from __future__ import annotations

import pytest
import torch

from graphllm.kernels.embedding import embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_token_gets_its_row(dtype: torch.dtype) -> None:
    weight = torch.arange(28.0).view(7, 4).to(dtype)
    out = torch.full((3, 4), torch.nan, dtype=dtype)
    assert embedding(torch.tensor([6, 0, 6]), weight, out=out) is out
    assert out.tolist() == [weight[6].tolist(), weight[0].tolist(), weight[6].tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scale_and_product_are_rounded_as_gemma_does(dtype: torch.dtype) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    torch.manual_seed(0)
    scale = 640**0.5  # 25.298, and 25.25 in bfloat16
    theirs = Gemma3TextScaledWordEmbedding(11, 640, padding_idx=0, embed_scale=scale).to(dtype)
    token_ids = torch.tensor([10, 3, 3, 1])
    weight = theirs.weight.detach()
    out = embedding(token_ids, weight, out=torch.empty(4, 640, dtype=dtype), scale=scale)
    assert torch.equal(out, theirs(token_ids))


def test_token_outside_the_vocabulary_is_an_error() -> None:
    for token in (-1, 3):
        with pytest.raises(IndexError):
            embedding(torch.tensor([token]), torch.ones(3, 4), out=torch.empty(1, 4))
