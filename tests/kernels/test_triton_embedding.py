"""The embedding's kernel against its reference."""

from __future__ import annotations

import pytest
import torch

from graphllm.kernels.embedding import embedding, embedding_ref
from graphllm.kernels.triton_support import INTERPRETED
from tests.kernels.device import DEVICE

pytestmark = pytest.mark.triton

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 64, 80, 576, 1024, 2304])
@pytest.mark.parametrize("scale", [None, 25.298221])
def test_kernel_equals_its_reference(scale: float | None, hidden: int, dtype: torch.dtype) -> None:
    weight = torch.randn(11, hidden, generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE)
    weight[5] = torch.nan  # nobody's token
    token_ids = torch.tensor([10, 0, 3, 3, 9], device=DEVICE)
    memory = torch.full((7, hidden), torch.nan, dtype=dtype, device=DEVICE)
    out = memory[1:-1]
    assert embedding(token_ids, weight, out=out, scale=scale) is out
    expected = embedding_ref(token_ids, weight, out=torch.empty_like(out), scale=scale)
    # Without a scale rows are copied; the interpreter truncates where products are rounded to bfloat16.
    is_exact = scale is None or dtype != torch.bfloat16 or not INTERPRETED
    torch.testing.assert_close(out, expected, rtol=0.0 if is_exact else 2**-7, atol=0.0)
    assert memory[0].isnan().all() and memory[-1].isnan().all()


def test_no_tokens_are_no_error() -> None:
    no_ids = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    embedding(no_ids, torch.ones(3, 64, device=DEVICE), out=torch.empty(0, 64, device=DEVICE))


@pytest.mark.gpu  # 4 GiB of memory: the smallest matrix that overflows 32-bit offsets
def test_the_end_of_a_matrix_beyond_31_bits_is_reached() -> None:
    vocab, hidden = 2**15 + 1, 2**16
    weight = torch.zeros(vocab, hidden, dtype=torch.bfloat16, device=DEVICE)
    weight[-1] = 1.0
    out = torch.empty(1, hidden, dtype=torch.bfloat16, device=DEVICE)
    embedding(torch.tensor([vocab - 1], device=DEVICE), weight, out=out)
    assert (out == 1.0).all()
