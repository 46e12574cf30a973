"""Which layers share block tables, for the patterns that models have, and what it saves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphllm.cache.kv_cache import KVCache, KVCacheShape
from graphllm.cache.kv_groups import group_layers


def pattern(num_layers: int, num_local: int, window: int) -> list[int | None]:
    """So many windowed layers, then one that sees everything, again and again."""
    return [None if (layer + 1) % (num_local + 1) == 0 else window for layer in range(num_layers)]


@pytest.mark.parametrize(
    ("windows", "context", "size", "num_groups"),
    [
        (pattern(26, 5, 512), 32_768, 4, 7),  # Gemma 3 1B
        (pattern(62, 5, 1024), 131_072, 10, 7),  # Gemma 3 27B
        (pattern(26, 1, 4096), 8192, 13, 2),  # Gemma 2 2B
        (pattern(24, 1, 128), 131_072, 12, 2),  # gpt-oss 20B
        (pattern(32, 3, 4096), 131_072, 8, 4),  # Cohere 2
        ([4096] * 32, 32_768, 32, 1),  # Mistral
        ([4096] * 32, 4096, 32, 1),
        ([None] * 30, 8192, 30, 1),
    ],
)
def test_groups_of_known_patterns(
    windows: list[int | None], context: int, size: int, num_groups: int
) -> None:
    groups = group_layers(windows, max_model_len=context)
    assert (groups.size, groups.num_groups) == (size, num_groups)


def test_a_window_that_no_sequence_outgrows_is_none() -> None:
    assert group_layers([4096, None], max_model_len=4096).windows == (None,)
    assert group_layers([4096, None], max_model_len=4097).windows == (None, 4096)


@given(
    windows=st.lists(st.sampled_from([None, 64, 512]), min_size=1, max_size=70),
    context=st.sampled_from([128, 4096, 100_000]),
)
def test_every_layer_has_one_place_among_layers_that_see_the_same(
    windows: list[int | None], context: int
) -> None:
    groups = group_layers(windows, max_model_len=context)
    places = groups.places()
    assert len(places) == len(set(places)) == len(windows)
    for (group, place), window in zip(places, windows, strict=True):
        assert place < groups.size
        assert groups.windows[group] == (None if window is not None and window >= context else window)
    assert groups.num_groups <= 32


def test_layers_of_different_groups_share_tensors_and_those_of_one_do_not() -> None:
    groups = group_layers([7, None, 7, None, 7, 7], max_model_len=100)
    assert groups.windows == (None, 7, 7) and groups.layers == ((1, 3), (0, 2), (4, 5))
    shape = KVCacheShape(6, 2, 8, 4, torch.float32, kv_groups=groups)
    assert shape.bytes_per_block == 2 * shape.bytes_per_token * 4 // 6
    cache = KVCache(shape, 5, device=torch.device("cpu"))
    assert [layer.group for layer in cache.layers] == [1, 0, 1, 0, 2, 2]
    addresses = [layer.key.data_ptr() for layer in cache.layers]
    assert addresses[0] == addresses[1] == addresses[4]
    assert addresses[2] == addresses[3] == addresses[5] != addresses[0]
    assert cache.pools.bytes_per_block == shape.bytes_per_block
