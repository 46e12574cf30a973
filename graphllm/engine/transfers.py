"""Carries block transfers between the scheduler, which wants them, and the swapper, which copies.

Adapters on their way to the device go along.

Owns what happens at either end of a transfer, and the measurement of how long it took. No step waits here.
"""

from __future__ import annotations

import logging

from graphllm.cache.swap import BlockSwapper
from graphllm.engine.adapter_uploads import AdapterUploads
from graphllm.engine.measured_rates import MeasuredRates
from graphllm.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)


class Transfers:
    """To be asked by the loop: `launch_due` after each schedule, `poll` in each turn."""

    def __init__(
        self,
        scheduler: Scheduler,
        swapper: BlockSwapper,
        *,
        rates: MeasuredRates,
        uploads: AdapterUploads,
    ) -> None:
        self._uploads = uploads
        self._scheduler = scheduler
        self._swapper = swapper
        self._rates = rates

    @property
    def has_pending(self) -> bool:
        """Whether a copy is under way."""
        return self._swapper.has_pending or self._uploads.has_pending

    def launch_due(self) -> None:
        """Queue the copies that the scheduler wants now."""
        for transfer in self._scheduler.take_transfers():
            self._swapper.launch(transfer)
        self._uploads.launch_due()

    def poll(self) -> bool:
        """Tell the scheduler which copies have ended; False when none has."""
        uploads_ended = self._uploads.poll()
        finished = self._swapper.poll()
        for end in finished:
            transfer = end.transfer
            if end.error is None:
                self._rates.observe_copy(len(transfer.blocks), end.seconds)
            else:
                logger.error("a copy of %d KV blocks failed", len(transfer.blocks), exc_info=end.error)
            self._scheduler.transfer_completed(transfer.transfer_id, failed=end.error is not None)
        return uploads_ended or bool(finished)
