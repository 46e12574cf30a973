"""Store a step's keys and values in their paged cache slots.

    key_cache[slot // block_size, slot % block_size] = key[t]  for each token t and slot = slot_mapping[t]

and the same for values.
"""

from __future__ import annotations

from torch import Tensor


def kv_cache_write_ref(
    key: Tensor, value: Tensor, *, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Write in place; one scatter a tensor.

    key, value: [num_tokens, num_kv_heads, head_dim], any strides; caches: [num_blocks, block_size,
    num_kv_heads, head_dim]; slot_mapping: [num_tokens] int64, no slot twice. Raises IndexError for a slot
    outside the cache.
    """
    # view, not flatten: a cache that is not contiguous must fail, or the write would go to a copy.
    key_cache.view(-1, *key.shape[1:]).index_copy_(0, slot_mapping, key.to(key_cache.dtype))
    value_cache.view(-1, *value.shape[1:]).index_copy_(0, slot_mapping, value.to(value_cache.dtype))


def kv_cache_write(
    key: Tensor, value: Tensor, *, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """See `kv_cache_write_ref`."""
    kv_cache_write_ref(key, value, key_cache=key_cache, value_cache=value_cache, slot_mapping=slot_mapping)
