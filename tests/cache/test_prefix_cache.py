"""What the block manager keeps of released blocks: contents that can be found, dropped coldest first."""

from __future__ import annotations

import pytest

from graphllm.cache.block_manager import BlockManager


def published(manager: BlockManager, *contents: bytes) -> list[int]:
    """A table of held blocks with these contents."""
    table = manager.allocate(len(contents))
    for block, content in zip(table, contents, strict=True):
        assert manager.publish(block, content)
    return table


def test_freed_block_keeps_its_content() -> None:
    manager = BlockManager(8, 16)
    (block,) = published(manager, b"a")
    manager.release([block])
    assert manager.find(b"a") == block
    assert (manager.num_cached_blocks, manager.num_held_blocks) == (1, 0)
    assert manager.num_free_blocks == manager.num_usable_blocks, "cached blocks can be allocated"
    manager.share([block])
    assert (manager.num_cached_blocks, manager.num_held_blocks) == (0, 1)
    manager.check([[block]])


def test_free_blocks_are_taken_before_cached_ones() -> None:
    manager = BlockManager(8, 16)
    manager.release(published(manager, b"a"))
    manager.allocate(6)
    assert manager.find(b"a") is not None
    manager.allocate(1)
    assert manager.find(b"a") is None
    assert manager.num_evicted_blocks == 1


def test_leaves_go_before_roots_and_the_oldest_first() -> None:
    manager = BlockManager(7, 16)
    old, new = published(manager, b"a", b"ab", b"abc"), published(manager, b"x", b"xy", b"xyz")
    manager.release(reversed(old))
    manager.release(reversed(new))
    gone = []
    for _ in range(6):
        manager.allocate(1)
        gone += [name for name in (b"a", b"ab", b"abc", b"x", b"xy", b"xyz") if manager.find(name) is None]
    order = list(dict.fromkeys(gone))
    assert order == [b"abc", b"ab", b"a", b"xyz", b"xy", b"x"]


def test_hit_makes_a_content_the_warmest() -> None:
    manager = BlockManager(3, 16)
    first, second = published(manager, b"a", b"b")
    manager.release([first, second])
    manager.share([first])
    manager.release([first])
    manager.allocate(1)
    assert manager.find(b"b") is None and manager.find(b"a") == first


def test_content_behind_a_fence_can_be_shared_but_not_taken() -> None:
    manager = BlockManager(2, 16)
    (block,) = published(manager, b"a")
    manager.step_launched(1)
    manager.release([block])
    assert (manager.num_free_blocks, manager.num_pending_blocks) == (0, 1)
    manager.share([block])
    assert manager.num_pending_blocks == 0
    manager.release([block])
    manager.step_completed(1)
    assert manager.num_cached_blocks == 1
    manager.check([])


def test_release_in_a_step_that_reads_the_block_waits_for_that_step() -> None:
    manager = BlockManager(4, 16)
    table = manager.allocate(1)
    manager.fence_next_step(1)
    manager.release(table)
    assert manager.num_pending_blocks == 1, "no step is in flight yet, but one is about to be"
    manager.step_launched(1)
    manager.step_completed(1)
    assert manager.num_free_blocks == 3


def test_content_is_published_once() -> None:
    manager = BlockManager(4, 16)
    first, second = manager.allocate(2)
    assert manager.publish(first, b"a")
    assert not manager.publish(second, b"a")
    assert not manager.publish(first, b"b")
    manager.release([first, second])
    assert (manager.num_cached_blocks, manager.find(b"a")) == (1, first)


@pytest.mark.parametrize("place", ["held", "pending", "cached", "backed"])
def test_withdrawn_content_is_gone_wherever_its_block_is(place: str) -> None:
    manager = BlockManager(4, 16)
    (block,) = published(manager, b"a")
    if place == "pending":
        manager.step_launched(1)
    if place != "held":
        manager.release([block], backed=place == "backed")
    manager.withdraw(block, b"a")
    assert manager.find(b"a") is None
    manager.check([[block]] if place == "held" else [])
    if place == "pending":
        manager.step_completed(1)
    if place != "held":
        assert (manager.num_cached_blocks, manager.num_free_blocks) == (0, 3)


def test_withdrawing_what_another_block_publishes_now_does_nothing() -> None:
    manager = BlockManager(4, 16)
    first, second = manager.allocate(2)
    manager.publish(first, b"a")
    manager.withdraw(second, b"a")
    assert manager.find(b"a") == first


def test_backed_content_is_given_up_first() -> None:
    manager = BlockManager(3, 16)
    first, second = published(manager, b"a", b"b")
    manager.release([first, second])
    assert manager.coldest() == first
    manager.mark_backed(second)
    assert manager.num_lossless_blocks == 1
    manager.allocate(1)
    assert manager.find(b"b") is None and manager.find(b"a") == first


@pytest.mark.parametrize("damage", ["two names", "no name", "two places", "holder"])
def test_both_checks_notice_damage(damage: str) -> None:
    manager = BlockManager(6, 16)
    table = published(manager, b"a", b"b", b"c")
    cached = table.pop()
    manager.release([cached])
    manager.check([table])
    manager.touched.update((*table, cached))
    manager.check_touched([table])
    manager.touched.update((*table, cached))
    if damage == "two names":
        manager._hash_of[table[0]] = b"b"
    elif damage == "no name":
        manager._hash_of[cached] = None
    elif damage == "two places":
        manager._cached[table[0]] = None
    else:
        table.pop()
    with pytest.raises(AssertionError):
        manager.check_touched([table])
    with pytest.raises(AssertionError):
        manager.check([table])
