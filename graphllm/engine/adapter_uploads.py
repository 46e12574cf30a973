"""Carries adapters from host memory to the device's places, when the scheduler wants them there.

Owns the copies under way. No step waits for one: sequences whose adapter is being copied do.
"""

from __future__ import annotations

from collections import deque
from functools import partial

from graphllm.adapter import AdapterUpload
from graphllm.errors import StepFailedError
from graphllm.layers.lora import AdapterMemory
from graphllm.runner.device import Device, DeviceEvent
from graphllm.scheduler.scheduler import Scheduler


class AdapterUploads:
    """memory: None where no adapters are served."""

    def __init__(self, scheduler: Scheduler, memory: AdapterMemory | None, *, device: Device) -> None:
        self._scheduler = scheduler
        self._memory = memory
        self._device = device
        self._under_way: deque[tuple[AdapterUpload, DeviceEvent]] = deque()

    @property
    def has_pending(self) -> bool:
        """Whether a copy is under way."""
        return bool(self._under_way)

    def launch_due(self) -> None:
        """Queue the copies that the scheduler wants now."""
        for upload in self._scheduler.take_uploads():
            assert self._memory is not None, "adapters are served"
            # An adapter that was unloaded since, and whose requests have ended, has no image: nobody reads
            # what lies in its place then.
            image = upload.adapter.image
            work = partial(self._memory.upload, image, upload.place) if image is not None else _nothing
            # Nothing reads the place: its last reader's step has ended, and its next waits for the copy.
            self._under_way.append((upload, self._device.submit_copy(work, behind_steps=False)))

    def poll(self) -> bool:
        """Tell the scheduler which copies have ended; False when none has.

        Raises StepFailedError when one failed, which a device that works does not let happen.
        """
        has_ended = False
        while self._under_way and self._under_way[0][1].query():
            upload, event = self._under_way.popleft()
            if event.error is not None:
                raise StepFailedError(f"An adapter could not be copied: {event.error}") from event.error
            self._scheduler.upload_completed(upload)
            has_ended = True
        return has_ended


def _nothing() -> None:
    """No copy."""
