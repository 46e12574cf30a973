"""Which number format a model is served in."""

from __future__ import annotations

import pytest
import torch

from graphllm.models.config import resolve_dtype


@pytest.mark.parametrize(
    ("asked", "checkpoint", "on_cuda"),
    [
        ("auto", torch.bfloat16, torch.bfloat16),
        ("auto", torch.float16, torch.float16),
        ("auto", torch.float32, torch.bfloat16),
        ("auto", None, torch.bfloat16),
        ("float32", torch.bfloat16, torch.float32),
        ("float16", torch.bfloat16, torch.float16),
        ("bfloat16", torch.float16, torch.bfloat16),
    ],
)
def test_auto_is_the_checkpoint_s_16_bits_on_cuda_and_float32_on_a_cpu(
    asked: str, checkpoint: torch.dtype | None, on_cuda: torch.dtype
) -> None:
    assert resolve_dtype(asked, checkpoint, device_type="cuda") == on_cuda
    on_cpu = torch.float32 if asked == "auto" else on_cuda
    assert resolve_dtype(asked, checkpoint, device_type="cpu") == on_cpu
