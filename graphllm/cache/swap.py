"""Copies of KV blocks between the device and host memory, beside the steps.

Owns the host's pool, in which a block is one run of bytes (all layers, scales included), and the copies that
are under way. Decides nothing: which block goes where, and when either side may be used again, is the
scheduler's. Nothing here waits for a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Protocol

import numpy as np
import torch

from graphllm.batch import BlockTransfer, TransferDirection
from graphllm.cache.kv_cache import KVCache
from graphllm.kernels.block_copy import CopyKind, block_copy

_KINDS = {TransferDirection.OUT: CopyKind.OUT, TransferDirection.IN: CopyKind.INTO}


class CopyTimes(Protocol):
    """When a copy began and ended, in seconds."""

    @property
    def start(self) -> float: ...

    @property
    def end(self) -> float: ...


class CopyEvent(Protocol):
    """The end of a copy; see `runner/device.py`."""

    @property
    def times(self) -> CopyTimes: ...

    @property
    def error(self) -> BaseException | None: ...

    def query(self) -> bool: ...


class CopyDevice(Protocol):
    """What copies need of a device."""

    torch_device: torch.device

    def submit_copy(self, work: Callable[[], None], *, behind_steps: bool) -> CopyEvent: ...

    def empty_host(self, *size: int, dtype: torch.dtype) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class FinishedTransfer:
    """A transfer that has ended. error: what went wrong; the destinations' contents are then undefined.

    seconds: what the device took for it.
    """

    transfer: BlockTransfer
    error: BaseException | None
    seconds: float


@dataclass(frozen=True, slots=True)
class _Pending:
    transfer: BlockTransfer
    event: CopyEvent
    pairs: torch.Tensor


class BlockSwapper:
    """`launch` a transfer, `poll` for what has ended."""

    def __init__(self, kv_cache: KVCache, num_host_blocks: int, *, device: CopyDevice) -> None:
        self.num_host_blocks = num_host_blocks
        self.bytes_per_block = kv_cache.pools.bytes_per_block
        self.num_bytes_out = 0
        self.num_bytes_in = 0
        self.num_failed = 0
        self._pools = kv_cache.pools
        self._device = device
        self._host = device.empty_host(num_host_blocks, self.bytes_per_block, dtype=torch.uint8)
        self._pending: list[_Pending] = []
        self._spare_pairs: list[torch.Tensor] = []

    @property
    def has_pending(self) -> bool:
        """Whether a transfer was launched that `poll` has not returned."""
        return bool(self._pending)

    def launch(self, transfer: BlockTransfer) -> None:
        """Queue a transfer's copies. Never blocks; what goes wrong is told by `poll`.

        Copies out read what all steps launched before leave in the blocks. Copies in wait for no step: the
        blocks are the transfer's own.
        """
        pairs = self._take_pairs(len(transfer.blocks))
        # By way of numpy: torch takes ten times as long for a tuple of tuples.
        numbers = np.fromiter(chain.from_iterable(transfer.blocks), np.int64, 2 * len(transfer.blocks))
        pairs[: len(transfer.blocks)] = torch.from_numpy(numbers).view(-1, 2)
        work = partial(self._copy, pairs[: len(transfer.blocks)], _KINDS[transfer.direction])
        is_out = transfer.direction is TransferDirection.OUT
        event = self._device.submit_copy(work, behind_steps=is_out)
        self._pending.append(_Pending(transfer, event, pairs))

    def poll(self) -> list[FinishedTransfer]:
        """The transfers that have ended since the last call, in any order. Never blocks."""
        if not self._pending:
            return []
        finished = []
        still_pending = []
        for pending in self._pending:
            if not pending.event.query():
                still_pending.append(pending)
                continue
            self._spare_pairs.append(pending.pairs)
            times, error = pending.event.times, pending.event.error
            finished.append(FinishedTransfer(pending.transfer, error, times.end - times.start))
            self._count(pending.transfer, failed=error is not None)
        self._pending = still_pending
        return finished

    def compile_copies(self) -> None:
        """Have the kernels of all copies compiled now rather than while serving.

        To be called before there are sequences: block 1 is written.
        """
        zero_to_zero, zero_to_one = torch.tensor([[[0, 0]], [[0, 1]]]).to(self._device.torch_device)
        block_copy(self._pools, zero_to_one, kind=CopyKind.WITHIN)
        if self.num_host_blocks:
            block_copy(self._pools, zero_to_zero, kind=CopyKind.OUT, host=self._host)
            block_copy(self._pools, zero_to_one, kind=CopyKind.INTO, host=self._host)

    def _count(self, transfer: BlockTransfer, *, failed: bool) -> None:
        num_bytes = len(transfer.blocks) * self.bytes_per_block
        if failed:
            self.num_failed += 1
        elif transfer.direction is TransferDirection.OUT:
            self.num_bytes_out += num_bytes
        else:
            self.num_bytes_in += num_bytes

    def _take_pairs(self, num_pairs: int) -> torch.Tensor:
        """Host memory for a transfer's block numbers, that no copy under way still reads."""
        for index, pairs in enumerate(self._spare_pairs):
            if len(pairs) >= num_pairs:
                return self._spare_pairs.pop(index)
        # The next power of two, so that a few of them serve transfers of all sizes.
        return self._device.empty_host(1 << (num_pairs - 1).bit_length(), 2, dtype=torch.int64)

    def _copy(self, pairs: torch.Tensor, kind: CopyKind) -> None:
        """On the device."""
        pairs = pairs.to(self._device.torch_device, non_blocking=True)
        block_copy(self._pools, pairs, kind=kind, host=self._host)
