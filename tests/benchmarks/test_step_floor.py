"""The floor of a decode step: the arithmetic, on shapes small enough to count."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.step_floor import Ceilings, ModelSize, step_floor

SHAPES = {
    "model.embed_tokens.weight": (100, 8),
    "model.layers.0.self_attn.q_proj.weight": (16, 8),
    "model.layers.0.input_layernorm.weight": (8,),
}
CONFIG = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8}


def checkpoint(shapes: dict[str, tuple[int, ...]], **config: int) -> Any:
    return SimpleNamespace(
        hf_config=CONFIG | config, tensor_names=lambda: shapes, tensor_shape=shapes.__getitem__
    )


def test_a_tied_head_is_read_with_the_embedding_table() -> None:
    assert ModelSize.of(checkpoint(SHAPES)) == ModelSize(800 + 128 + 8, 800 + 128, 2 * 3 * 2 * 2)


def test_an_embedding_table_of_its_own_is_not_read_but_for_a_few_rows() -> None:
    size = ModelSize.of(checkpoint(SHAPES | {"lm_head.weight": (100, 8)}))
    assert size == ModelSize(800 + 128 + 8, 800 + 128, 24)


def test_a_head_dim_of_its_own_counts() -> None:
    assert ModelSize.of(checkpoint(SHAPES, head_dim=32)).num_kv_elements == 2 * 3 * 2 * 32


def test_weights_are_read_once_a_step_and_kv_once_a_row() -> None:
    size = ModelSize(num_step_weights=1000, num_product_weights=900, num_kv_elements=10)
    ceilings = Ceilings(bytes_per_second=1e6, flops_per_second=1e7)
    one = step_floor(size, ceilings, num_rows=1, context_len=5, bytes_per_element=4)
    four = step_floor(size, ceilings, num_rows=4, context_len=5, bytes_per_element=4)
    assert one.num_bytes == 4 * (1000 + 50)
    assert four.num_bytes == 4 * (1000 + 200)
    assert (one.num_flops, four.num_flops) == (1800, 7200)
    assert one.read_ms == pytest.approx(4.2)
    assert four.compute_ms == pytest.approx(0.72)
