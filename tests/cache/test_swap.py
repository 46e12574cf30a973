"""Blocks on their way to host memory and back: bit for bit, asynchronous, and what fails is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest
import torch

from graphllm.batch import BlockTransfer, TransferDirection
from graphllm.cache.swap import BlockSwapper, FinishedTransfer
from graphllm.runner.device import CpuDevice, DeviceEvent, InlineDevice, Work
from tests.kernels.block_pools import KV_DTYPES, bytes_of, random_cache

CPU = torch.device("cpu")
OUT, IN = TransferDirection.OUT, TransferDirection.IN


def finished_within(swapper: BlockSwapper, seconds: float = 10) -> list[FinishedTransfer]:
    """Everything that was launched."""
    deadline = time.monotonic() + seconds
    finished = []
    while swapper.has_pending:
        assert time.monotonic() < deadline
        finished += swapper.poll()
        time.sleep(0.001)
    return finished


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("device", [InlineDevice, lambda: CpuDevice(1)], ids=["inline", "cpu"])
def test_blocks_swapped_out_and_back_are_bit_identical(dtype: torch.dtype, device: type) -> None:
    cache = random_cache(dtype, num_blocks=8, device=CPU)
    before = bytes_of(cache)
    running = device()
    swapper = BlockSwapper(cache, 5, device=running)
    swapper.launch(BlockTransfer(1, OUT, ((3, 4), (7, 0), (1, 2))))
    # Others use the blocks meanwhile; the device does things in order.
    running.submit(partial(overwrite, cache, [1, 3, 7]))
    swapper.launch(BlockTransfer(2, IN, ((4, 5), (0, 1), (2, 6))))
    finished = finished_within(swapper)
    running.close()
    assert [(end.transfer.transfer_id, end.error) for end in finished] == [(1, None), (2, None)]
    for old, new in zip(before, bytes_of(cache), strict=True):
        assert torch.equal(new[[5, 1, 6]], old[[3, 7, 1]])
        assert torch.equal(new[[0, 2, 4]], old[[0, 2, 4]])
    assert swapper.num_bytes_out == swapper.num_bytes_in == 3 * cache.shape.bytes_per_block


def overwrite(cache, blocks: list[int]) -> None:  # type: ignore[no-untyped-def]
    for pool in cache.pools.pools:
        pool.view(cache.num_blocks, -1).view(torch.uint8)[blocks] = 0


class LateDevice(InlineDevice):
    """Work is done when the test says so, in any order; behind_steps is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.works: list[tuple[LateEvent, Work]] = []
        self.waited: list[bool] = []

    def submit_copy(self, work: Work, *, behind_steps: bool) -> DeviceEvent:
        event = LateEvent()
        self.works.append((event, work))
        self.waited.append(behind_steps)
        return event

    def do(self, index: int, *, fault: Callable[[], None] = lambda: None) -> None:
        event, work = self.works[index]
        event.done = self.submit(lambda: (work(), fault())[0])


class LateEvent:
    done: DeviceEvent | None = None

    @property
    def times(self):  # type: ignore[no-untyped-def]
        assert self.done is not None
        return self.done.times

    @property
    def error(self) -> BaseException | None:
        return None if self.done is None else self.done.error

    def query(self) -> bool:
        return self.done is not None


def explode() -> None:
    raise RuntimeError("injected fault")


def test_transfers_end_in_any_order_and_each_is_told_once() -> None:
    device = LateDevice()
    cache = random_cache(torch.float32, num_blocks=8, device=CPU)
    swapper = BlockSwapper(cache, 4, device=device)
    before = bytes_of(cache)
    for number in range(3):
        swapper.launch(BlockTransfer(number, OUT, ((number + 1, number),)))
    assert swapper.poll() == [] and swapper.has_pending
    device.do(2)
    device.do(0)
    assert [end.transfer.transfer_id for end in swapper.poll()] == [0, 2]
    assert swapper.poll() == []
    # The memory of ended transfers is used again, that of the pending one is not.
    swapper.launch(BlockTransfer(3, IN, ((2, 7),)))
    device.do(1)
    device.do(3)
    assert [end.transfer.transfer_id for end in swapper.poll()] == [1, 3]
    assert not swapper.has_pending
    for old, new in zip(before, bytes_of(cache), strict=True):
        assert torch.equal(new[7], old[3])


def test_transfers_use_the_memory_of_their_block_numbers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    device = InlineDevice()
    swapper = BlockSwapper(random_cache(torch.int8, num_blocks=8, device=CPU), 7, device=device)
    sizes: list[int] = []
    empty_host = device.empty_host

    def counted(*size: int, dtype: torch.dtype) -> torch.Tensor:
        sizes.append(size[0])
        return empty_host(*size, dtype=dtype)

    monkeypatch.setattr(device, "empty_host", counted)
    for number, count in enumerate([5, 3, 7, 1, 5, 7]):
        blocks = tuple((index + 1, index) for index in range(count))
        swapper.launch(BlockTransfer(number, OUT, blocks))
        swapper.poll()
    assert sizes == [8]


def test_only_copies_out_wait_for_steps() -> None:
    device = LateDevice()
    swapper = BlockSwapper(random_cache(torch.int8, num_blocks=3, device=CPU), 1, device=device)
    swapper.launch(BlockTransfer(1, OUT, ((1, 0),)))
    swapper.launch(BlockTransfer(2, IN, ((0, 2),)))
    assert device.waited == [True, False]


def test_a_failed_transfer_says_so_and_counts_no_bytes() -> None:
    device = LateDevice()
    swapper = BlockSwapper(random_cache(torch.int8, num_blocks=3, device=CPU), 1, device=device)
    swapper.launch(BlockTransfer(1, OUT, ((1, 0),)))
    device.do(0, fault=explode)
    (end,) = swapper.poll()
    assert "injected fault" in str(end.error)
    assert (swapper.num_bytes_out, swapper.num_failed) == (0, 1)
