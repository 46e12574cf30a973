from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.attention_batch import (
    Attention,
    assert_attended,
    attention_batch,
    beside,
    draw_sinks,
    pairwise,
)
from tests.kernels.device import DEVICE

pytestmark = pytest.mark.triton

HAS_E4M3 = DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= (8, 9)
AXES: dict[str, list[Any]] = {
    "group": [1, 2, 3, 5, 8],
    "head_dim": [64, 80, 96, 128, 256],
    "block_size": [16, 64],
    "dtype": [torch.bfloat16, torch.float32, torch.float16],
    "cache_dtype": [None, torch.int8, torch.float8_e5m2, *([torch.float8_e4m3fn] if HAS_E4M3 else [])],
    # Narrower than a query tile, between a tile and the context, wider than everything.
    "sliding_window": [None, 5, 90, 1000],
    "softcap": [None, 3.0],
    "beside": [None, "sinks", "slopes"],
}


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


@pytest.mark.parametrize("case", list(pairwise(AXES)), ids=name_of)
def test_prefill_rows_equal_the_reference(case: dict[str, Any]) -> None:
    """A short prompt, a chunk behind a cached prefix, and one whose context ends where a block does."""
    block_size, group = case["block_size"], case["group"]
    batch = attention_batch(
        [(5, 5), (30, 190), (2, 2 * block_size)],
        group=group,
        num_kv_heads=1,
        head_dim=case["head_dim"],
        block_size=block_size,
        dtype=case["dtype"],
        cache_dtype=case["cache_dtype"],
    )
    attention = Attention(
        batch,
        sliding_window=case["sliding_window"],
        softcap=case["softcap"],
        **beside(case["beside"], group),
    )
    assert_attended(attention.run(decode=False), attention.expected())


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "group", "head_dim", "sliding_window"),
    [
        (torch.bfloat16, None, 1, 64, None),
        (torch.float32, None, 3, 80, 40),
        (torch.bfloat16, torch.int8, 2, 256, 9),
        (torch.float16, None, 4, 64, 1000),
    ],
)
def test_whole_prompts_that_see_all_of_themselves(
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    group: int,
    head_dim: int,
    sliding_window: int | None,
) -> None:
    """Of several items each, among them one whose last item sees keys of every other one."""
    batch = attention_batch(
        [(1, 1), (150, 150), (2, 2), (64, 64), (0, 0)],
        group=group,
        num_kv_heads=1,
        head_dim=head_dim,
        dtype=dtype,
        cache_dtype=cache_dtype,
    )
    attention = Attention(batch, sliding_window=sliding_window, is_causal=False)
    assert_attended(attention.run(), attention.expected())


@pytest.mark.parametrize("sliding_window", [None, 100])
def test_rows_of_many_tiles(sliding_window: int | None) -> None:
    """More pairs of items and heads than programs, so that programs turn around and come back."""
    batch = attention_batch([(150, 210), (64, 64), (33, 70)], group=2, dtype=torch.bfloat16)
    attention = Attention(batch, sliding_window=sliding_window)
    assert_attended(attention.run(decode=False), attention.expected())
    num_pairs, num_programs = 2 * int(attention.prefill_work.num_items), 2 * 2
    assert num_pairs > 2 * num_programs


def test_decode_rows_and_padding_are_left_alone() -> None:
    batch = attention_batch([(1, 40), (7, 50), (1, 3), (2, 2), (0, 0)], num_padding_tokens=4)
    attention = Attention(batch)
    out, expected = attention.run(decode=False), attention.expected()
    prefilled = [*range(1, 8), 9, 10]
    assert_attended(out[prefilled], expected[prefilled])
    assert out[[0, 8]].isnan().all() and out[11:].isnan().all()


def test_a_mixed_batch_is_attended_by_both_kernels() -> None:
    batch = attention_batch([(1, 230), (1, 9), (40, 40), (3, 100), (1, 77)], dtype=torch.bfloat16)
    attention = Attention(batch, sinks=draw_sinks(8))
    assert_attended(attention.run(), attention.expected())


def test_a_batch_of_padding_writes_nothing() -> None:
    attention = Attention(attention_batch([(0, 0), (0, 0)], num_padding_tokens=5))
    assert attention.run(decode=False).isnan().all()


def test_other_lengths_at_the_same_addresses() -> None:
    """What a replayed graph does: no length of the first step may be left in the launches."""
    batch = attention_batch([(60, 100), (4, 90), (6, 6)])
    attention = Attention(batch)
    assert_attended(attention.run(decode=False), attention.expected())
    batch.query_lens.copy_(torch.tensor([3, 40, 0]))
    batch.context_lens.copy_(torch.tensor([100, 80, 0]))
    batch.query_starts.copy_(torch.tensor([0, 3, 43, 43]))
    out, expected = attention.run(decode=False), attention.expected()
    assert_attended(out[:43], expected[:43])
    assert out[43:].isnan().all()
