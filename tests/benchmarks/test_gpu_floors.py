"""Floors and times: the arithmetic, on shapes small enough to count and on those that are published."""

from __future__ import annotations

import math

import pytest

from benchmarks.gpu.attention import RAGGED, UNIFORM, deal_blocks, kv_bytes
from benchmarks.gpu.floors import SHAPES, Ceilings, ModelShape, context_name, shape_of
from benchmarks.gpu.prefill import prefill_share
from benchmarks.gpu.timing import timing_of

CARD = Ceilings(bytes_per_second=3.0e12, flops_per_second=790e12)
TINY = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 8,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def test_weights_and_kv_of_a_small_model_are_counted() -> None:
    shape = ModelShape.of(TINY)
    # head_dim 2: queries 8 x 8, keys and values 4 x 8 each, output 8 x 8; three matrices of 20 x 8.
    assert shape.num_layer_weights == 3 * (64 + 2 * 32 + 64 + 3 * 160)
    assert shape.num_other_weights == 3 * 16 + 8
    assert (shape.num_head_weights, shape.num_kv_elements) == (800, 2 * 3 * 2 * 2)


def test_norms_of_query_and_key_heads_are_counted_where_there_are_any() -> None:
    qwen = ModelShape.of(TINY | {"model_type": "qwen3", "head_dim": 6})
    plain = ModelShape.of(TINY | {"head_dim": 6})
    assert qwen.num_other_weights == plain.num_other_weights + 3 * 12


def test_a_decode_step_reads_weights_once_and_each_rows_kv() -> None:
    shape = ModelShape.of(TINY)
    weights = shape.num_layer_weights + shape.num_other_weights + shape.num_head_weights
    assert shape.decode_bytes(1, 10) == 2 * (weights + 10 * 24)
    assert shape.decode_bytes(4, 10) == 2 * (weights + 40 * 24)
    # Packed weights are those of the layers' matrices alone.
    packed = shape.decode_bytes(1, 10, layer_bits=5)
    assert packed == shape.decode_bytes(1, 10) - 11 * shape.num_layer_weights // 8


def test_a_prompt_multiplies_every_token_and_attends_causally() -> None:
    shape = ModelShape.of(TINY)
    # 3 tokens attend to 1 + 2 + 3 keys, in two products, with 4 heads of 2 in 3 layers.
    expected = 2 * 3 * shape.num_layer_weights + 2 * 800 + 2 * 2 * 6 * 4 * 2 * 3
    assert shape.prefill_flops(3) == expected


@pytest.mark.parametrize(
    ("name", "batch", "context", "milliseconds"),
    [
        ("llama-3.2-1b", 1, 1024, 0.84),
        ("llama-3.2-1b", 64, 1024, 1.54),
        ("qwen3-0.6b", 1, 1024, 0.44),
        ("qwen3-0.6b", 64, 1024, 2.90),
        ("llama-3.1-8b", 1, 1024, 5.05),
        ("llama-3.1-8b", 64, 1024, 7.87),
        ("llama-3.1-8b", 1, 4096, 5.18),
    ],
)
def test_floors_of_published_models_are_those_that_were_worked_out_before(
    name: str, batch: int, context: int, milliseconds: float
) -> None:
    assert shape_of(name).decode_floor_ms(batch, context, CARD) == pytest.approx(milliseconds, rel=0.01)


@pytest.mark.parametrize(
    ("name", "tokens", "milliseconds"),
    [("llama-3.2-1b", 8192, 25.8), ("llama-3.1-8b", 1024, 18.4), ("llama-3.1-8b", 8192, 167.0)],
)
def test_prefill_floors_too(name: str, tokens: int, milliseconds: float) -> None:
    assert shape_of(name).prefill_floor_ms(tokens, CARD) == pytest.approx(milliseconds, rel=0.01)


def test_a_prefill_at_its_floor_reaches_the_whole_rate() -> None:
    floor = shape_of("llama-3.1-8b").prefill_floor_ms(8192, CARD)
    assert prefill_share(floor, CARD, shape="llama-3.1-8b", prompt=8192) == pytest.approx(1.0)
    assert prefill_share(2 * floor, CARD, shape="llama-3.1-8b", prompt=8192) == pytest.approx(0.5)


def test_the_two_floors_of_a_step_are_reading_and_multiplying() -> None:
    shape = ModelShape.of(TINY)
    slow_products = Ceilings(bytes_per_second=1e12, flops_per_second=1e6)
    products = 2 * 4 * (shape.num_layer_weights + shape.num_head_weights)
    assert shape.decode_floor_ms(4, 10, slow_products) == pytest.approx(1e3 * products / 1e6)
    slow_memory = Ceilings(bytes_per_second=1e3, flops_per_second=1e12)
    assert shape.prefill_floor_ms(3, slow_memory) == pytest.approx(shape.decode_bytes(1, 3))


def test_all_shapes_have_a_file_and_contexts_a_name() -> None:
    assert {shape_of(name).vocab_size for name in SHAPES} == {128256, 151936}
    assert (context_name(1024), context_name(131072)) == ("1k", "128k")


def test_a_timing_is_the_median_and_the_least() -> None:
    timing = timing_of([3.0, 1.0, 2.0, 10.0])
    assert (timing.median, timing.least, timing.num_samples) == (2.5, 1.0, 4)
    assert timing_of([3.0, 1.0, 2.0]).median == 2.0


@pytest.mark.parametrize("samples", [[], [1.0, 0.0], [1.0, math.nan], [-1.0]])
def test_what_is_no_time_is_refused(samples: list[float]) -> None:
    with pytest.raises(ValueError, match=r"no samples|not times"):
        timing_of(samples)


def test_the_ragged_and_the_uniform_batch_have_the_same_bytes() -> None:
    shape = shape_of("llama-3.1-8b")
    assert kv_bytes(shape, RAGGED) == kv_bytes(shape, UNIFORM) == 2 * 2 * 1024 * (16384 + 63 * 512)
    assert len(RAGGED) == len(UNIFORM) == 64


def test_every_row_gets_blocks_of_its_own_and_none_the_null_block() -> None:
    import torch

    tables, num_blocks = deal_blocks([16, 17, 1], device=torch.device("cpu"))
    dealt = tables[tables > 0].tolist()
    assert sorted(dealt) == [1, 2, 3, 4]
    assert num_blocks == 5
    assert (tables > 0).sum(dim=1).tolist() == [1, 2, 1]
