from __future__ import annotations

from itertools import combinations
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
    "group": [1, 2, 3, 4, 5, 7, 8],
    "head_dim": [64, 80, 96, 128, 256],
    "block_size": [16, 64],
    # Three programs: the longest row is cut; one program: no row is.
    "num_programs": [3, 1],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "cache_dtype": [None, torch.int8, torch.float8_e5m2, *([torch.float8_e4m3fn] if HAS_E4M3 else [])],
    "sliding_window": [None, 5, 70],
    "softcap": [None, 3.0],
    "beside": [None, "sinks", "slopes"],
}


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


def test_cover_has_every_pair() -> None:
    cases = list(pairwise(AXES))
    for first, second in combinations(AXES, 2):
        together = {(case[first], case[second]) for case in cases}
        assert len(together) == len(AXES[first]) * len(AXES[second])
    assert len(cases) <= 45


@pytest.mark.parametrize("case", list(pairwise(AXES)), ids=name_of)
def test_decode_rows_equal_the_reference(case: dict[str, Any]) -> None:
    block_size, group = case["block_size"], case["group"]
    contexts = [1, 200, block_size - 1, 0, block_size, block_size + 1]
    batch = attention_batch(
        [(min(context, 1), context) for context in contexts],
        group=group,
        head_dim=case["head_dim"],
        block_size=block_size,
        dtype=case["dtype"],
        cache_dtype=case["cache_dtype"],
    )
    attention = Attention(
        batch,
        num_programs=case["num_programs"],
        sliding_window=case["sliding_window"],
        softcap=case["softcap"],
        **beside(case["beside"], 2 * group),
    )
    assert_attended(attention.run(prefill=False), attention.expected())


@pytest.mark.parametrize("block_size", [8, 128])
def test_contexts_of_many_pieces(block_size: int) -> None:
    """16 granules, three a program: one has a row's rest, a whole row and another's beginning."""
    batch = attention_batch([(1, 330), (1, 64), (1, 449), (1, 1)], num_kv_heads=1, block_size=block_size)
    attention = Attention(batch, num_programs=6, sinks=draw_sinks(4))
    assert_attended(attention.run(prefill=False), attention.expected())
    assert attention.decode_work.cuts[:3, 3].tolist() == [2, 3, 0]


def test_more_pieces_than_a_combination_reads_at_once() -> None:
    batch = attention_batch([(1, 20 * 64)], group=1, num_kv_heads=1, head_dim=256)
    batch.key_cache[batch.block_tables[batch.row_slots[0], -4:].long()] *= 2  # the maximum comes late
    attention = Attention(batch, num_programs=20)
    assert_attended(attention.run(prefill=False), attention.expected())
    assert attention.decode_work.cuts[0, 3] == 20


def test_prefill_rows_and_padding_are_left_alone() -> None:
    batch = attention_batch([(1, 40), (7, 50), (1, 3), (0, 0), (0, 0)], num_padding_tokens=4)
    attention = Attention(batch)
    out, expected = attention.run(prefill=False), attention.expected()
    assert_attended(out[[0, 8]], expected[[0, 8]])
    assert out[1:8].isnan().all() and out[9:].isnan().all()


def test_a_batch_of_padding_writes_nothing() -> None:
    attention = Attention(attention_batch([(0, 0), (0, 0)], num_padding_tokens=2))
    assert attention.run(prefill=False).isnan().all()


def test_other_lengths_at_the_same_addresses() -> None:
    """What a replayed graph does: no length of the first step may be left in the launches."""
    batch = attention_batch([(1, 300), (1, 20), (1, 150), (1, 1)], head_dim=128, dtype=torch.bfloat16)
    attention = Attention(batch)
    assert_attended(attention.run(prefill=False), attention.expected())
    batch.context_lens.copy_(torch.tensor([17, 20, 0, 1]))
    batch.query_lens.copy_(torch.tensor([1, 1, 0, 1]))
    batch.query_starts.copy_(torch.tensor([0, 1, 2, 2, 3]))
    batch.query.copy_(batch.query.flip(0))
    out, expected = attention.run(prefill=False), attention.expected()
    assert_attended(out[:3], expected[:3])
    assert out[3:].isnan().all()


def test_the_same_step_gives_the_same_bits() -> None:
    attention = Attention(attention_batch([(1, 300), (1, 120)], num_kv_heads=1), num_programs=4)
    first = attention.run(prefill=False).clone()
    assert torch.equal(first, attention.run(prefill=False))


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e5m2])
def test_a_token_of_zeros_has_no_scale_and_counts(cache_dtype: torch.dtype) -> None:
    """Scale 0: its score is exactly 0 and its value too, whatever its neighbours are."""
    batch = attention_batch([(1, 1), (1, 90)], cache_dtype=cache_dtype)
    assert batch.key_scale is not None and batch.value_scale is not None
    block, offset = batch.block_tables[batch.row_slots[0], 0], 0
    for cache, scale in ((batch.key_cache, batch.key_scale), (batch.value_cache, batch.value_scale)):
        cache[block, offset] = torch.zeros(64).to(cache.dtype)
        scale[block, offset] = 0.0
    out = Attention(batch).run(prefill=False)
    assert (out[0] == 0).all() and out[1].isfinite().all()
