"""What 8-bit KV does to the demo model: perplexity, and attention outputs layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.kv_quality import (
    BLOCK_SIZE,
    NUM_WINDOWS,
    WINDOW,
    Subject,
    demo_subject,
    perplexity,
    text_tokens,
    token_losses,
)
from graphllm.attention.backend import LayerCache
from graphllm.attention.paged import PagedAttention
from graphllm.cache.kv_cache import KVCacheShape, LayerKV
from graphllm.kernels import rotary_cache_write

E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
# Of the norm of a layer's attention outputs, errors of the layers before included.
MAX_LAYER_ERROR = {E4M3: 0.15, E5M2: 0.3, INT8: 0.06}


class RecordingAttention(PagedAttention):
    """Keeps every layer's output; `reads_scales` False takes what is stored for what is meant."""

    def __init__(self) -> None:
        super().__init__(block_size=BLOCK_SIZE)
        self.outputs: list[torch.Tensor] = []
        self.reads_scales = True

    def forward(
        self, query: torch.Tensor, *, layer_cache: LayerCache, out: torch.Tensor, **rest: Any
    ) -> None:
        if not self.reads_scales and layer_cache.key_scale is not None:
            ones = torch.ones_like(layer_cache.key_scale)
            layer_cache = LayerKV(layer_cache.key, layer_cache.value, ones, ones)
        super().forward(query, layer_cache=layer_cache, out=out, **rest)
        self.outputs.append(out.clone())


@pytest.fixture(scope="module")
def attention() -> RecordingAttention:
    return RecordingAttention()


@pytest.fixture(scope="module")
def subject(attention: RecordingAttention) -> Subject:
    """The demo model with keys and values of 2^-20 their size, and queries and outputs that make up for it.

    In float32 it is the same model to the last bit. It needs its cache's scales: unscaled, the smallest
    number of any 8-bit format is larger than its keys and values.
    """
    subject = demo_subject(attention)
    with torch.inference_mode():
        for layer in subject.model.layers:
            part = layer.attention
            spec = part.spec
            query, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
            part.qkv.weight[:query] *= 2.0**20
            part.qkv.weight[query : query + 2 * kv] *= 2.0**-20
            part.output.weight *= 2.0**20
    return subject


def layer_errors(subject: Subject, attention: RecordingAttention, dtype: torch.dtype) -> list[float]:
    """Of each layer's attention output, against a float32 cache."""
    token_ids = text_tokens(subject.tokenizer, 96)
    outputs = []
    for kv_dtype in (torch.float32, dtype):
        attention.outputs = []
        token_losses(subject.model, kv_dtype, token_ids)
        outputs.append(attention.outputs)
    assert len(outputs[0]) == len(outputs[1]) == subject.model.config.num_layers
    return [((wrong - right).norm() / right.norm()).item() for right, wrong in zip(*outputs, strict=True)]


@pytest.mark.parametrize("dtype", MAX_LAYER_ERROR)
def test_every_layers_attention_is_close_to_that_over_a_float32_cache(
    subject: Subject, attention: RecordingAttention, dtype: torch.dtype
) -> None:
    assert max(layer_errors(subject, attention, dtype)) < MAX_LAYER_ERROR[dtype]


@pytest.mark.parametrize("dtype", MAX_LAYER_ERROR)
def test_a_cache_whose_scales_are_not_read_fails_in_every_layer(
    subject: Subject, attention: RecordingAttention, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "reads_scales", False)
    assert min(layer_errors(subject, attention, dtype)) > 2 * MAX_LAYER_ERROR[dtype]


@pytest.mark.parametrize("dtype", MAX_LAYER_ERROR)
def test_a_cache_that_stores_without_scales_fails_in_every_layer(
    subject: Subject, attention: RecordingAttention, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_scale(x: torch.Tensor, stored: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        rounded = x.round().clamp(-127, 127) if stored == INT8 else x
        return rounded.to(stored), torch.ones(x.shape[:-1])

    monkeypatch.setattr(rotary_cache_write, "quantize_kv_ref", without_scale)
    assert min(layer_errors(subject, attention, dtype)) > 2 * MAX_LAYER_ERROR[dtype]


@pytest.mark.slow
def test_perplexity_over_eight_thousand_tokens_rises_by_less_than_two_percent_and_a_half() -> None:
    assert NUM_WINDOWS * (WINDOW - 1) >= 8_000
    subject = demo_subject()
    values = {
        dtype: perplexity(subject, dtype, num_windows=NUM_WINDOWS) for dtype in (torch.float32, E4M3, INT8)
    }
    assert 5 < values[torch.float32] < 50, "not a text that the model can read"
    assert values[E4M3] < 1.02 * values[torch.float32]
    assert values[INT8] < 1.005 * values[torch.float32]


@pytest.mark.parametrize("dtype", [E4M3, E5M2, INT8])
@pytest.mark.parametrize(("head_dim", "gain"), [(64, 1.88), (128, 1.93)])
def test_eight_bits_hold_almost_twice_the_tokens_of_bfloat16(
    dtype: torch.dtype, head_dim: int, gain: float
) -> None:
    def tokens(of: torch.dtype, num_bytes: int = 10**9) -> int:
        shape = KVCacheShape(num_layers=16, num_kv_heads=8, head_dim=head_dim, block_size=16, dtype=of)
        return num_bytes // shape.bytes_per_block * shape.block_size

    assert tokens(dtype) >= gain * tokens(torch.bfloat16)
