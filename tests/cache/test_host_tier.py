"""The host tier keeps every block in one place, and its two uses out of each other's way."""

from __future__ import annotations

import pytest

from graphllm.cache.host_tier import HostTier


def put(host: HostTier, content_hash: bytes) -> int:
    """Cache a content as a transfer does: allocate, fill, publish, release."""
    block = host.allocate_cache()
    assert block is not None
    host.publish(block, content_hash)
    host.release([block])
    return block


def test_coldest_content_gives_way_when_the_cache_is_full() -> None:
    host = HostTier(num_cache_blocks=2)
    for content in (b"a", b"b"):
        put(host, content)
    found = host.find(b"a")
    assert found is not None
    host.share([found])
    host.release([found])  # used: now "b" is the coldest
    put(host, b"c")
    assert host.find(b"b") is None
    assert host.find(b"a") is not None and host.find(b"c") is not None
    host.check([])


def test_content_that_somebody_holds_is_not_dropped() -> None:
    host = HostTier(num_cache_blocks=1)
    block = put(host, b"a")
    host.share([block])
    assert host.allocate_cache() is None
    host.check([[block]])
    host.release([block])
    assert host.allocate_cache() is not None
    assert host.find(b"a") is None


def test_swaps_do_not_take_the_cache_and_the_cache_does_not_take_swaps() -> None:
    host = HostTier(num_swap_blocks=3, num_cache_blocks=2)
    table = host.allocate_swap(3)
    assert host.num_free_swap_blocks == 0
    put(host, b"a"), put(host, b"b"), put(host, b"c")
    host.check([table])
    assert (host.num_held_blocks, host.num_cached_blocks, host.num_free_blocks) == (3, 2, 0)
    host.release(table)
    assert host.num_free_swap_blocks == 3
    assert host.num_free_blocks == 3


def test_content_that_is_there_already_is_kept_once() -> None:
    host = HostTier(num_cache_blocks=2)
    first = put(host, b"a")
    put(host, b"a")
    assert host.find(b"a") == first
    assert (host.num_cached_blocks, host.num_free_blocks) == (1, 1)
    host.check([])


@pytest.mark.parametrize("damage", ["leaked", "lost", "found"])
def test_check_notices_damage(damage: str) -> None:
    host = HostTier(num_swap_blocks=2, num_cache_blocks=2)
    block = put(host, b"a")
    table = host.allocate_swap(1)
    host.check([table])
    if damage == "lost":
        host._free.pop()
    elif damage == "found":
        del host._hash_of[block]
    with pytest.raises(AssertionError):
        host.check([] if damage == "leaked" else [table])
