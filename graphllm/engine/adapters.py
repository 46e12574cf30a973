"""The adapters that requests may name, and how they are loaded and unloaded while others are served.

Owns the names and the copies in host memory. Which adapter lies on the device is the scheduler's decision,
what a folder must hold `models/lora.py`'s.

A load reads on the device's worker, a few milliseconds at a time, so that steps come between. An unload
takes the name away at once: requests that were admitted keep the adapter to their end, and with the last of
them its memory goes. Two loads of one name are two adapters, also to the prefix cache.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

import torch

from graphllm.adapter import Adapter
from graphllm.errors import CheckpointError, InvalidRequestError, ModelNotFoundError
from graphllm.layers.lora import AdapterLayout
from graphllm.models.adapter_names import AdapterNames
from graphllm.models.lora import AdapterFolder
from graphllm.runner.device import Device

_SLICE_SECONDS = 0.003
_MAX_NAME_LENGTH = 200


class AdapterRegistry:
    """The adapters of one model; at most `max_adapters` have memory at once.

    reserved_names: the base model's, which no adapter may take.
    """

    def __init__(
        self, names: AdapterNames, layout: AdapterLayout, *, max_adapters: int, device: Device
    ) -> None:
        self.reserved_names: frozenset[str] = frozenset()
        self._names = names
        self._layout = layout
        self._max_adapters = max_adapters
        self._device = device
        self._loaded: dict[str, Adapter] = {}
        self._retired: list[Adapter] = []
        self._load_ids = count(1)
        self._lock = asyncio.Lock()  # one load at a time, so that two cannot take one name

    @property
    def adapters(self) -> list[Adapter]:
        """Those that requests may name, in the order in which they were loaded."""
        return list(self._loaded.values())

    def find(self, name: str) -> Adapter:
        """Raises ModelNotFoundError."""
        adapter = self._loaded.get(name)
        if adapter is None:
            raise ModelNotFoundError(f"There is no adapter {name[:_MAX_NAME_LENGTH]!r}.", param="model")
        return adapter

    async def load(self, name: str, path: str, *, replaces: bool = False) -> Adapter:
        """Read an adapter's folder; requests may name it on return.

        replaces: it takes the place of the adapter of that name, if there is one. Raises
        InvalidRequestError for a name that cannot be, or where there is no room, and CheckpointError for a
        folder that cannot be served; nothing has changed then.
        """
        async with self._lock:
            self.check_name(name, replaces=replaces)
            folder = await self._device.run(
                lambda: AdapterFolder(Path(path).expanduser(), self._names, max_rank=self._layout.max_rank)
            )
            # Not on the loop: to pin so much memory takes a card's driver tens of milliseconds.
            image = await self._device.run(
                lambda: self._device.empty_host(self._layout.num_bytes, dtype=torch.uint8)
            )
            slices = folder.read_in_slices(image, self._layout)
            while await self._device.run(partial(_read_slice, slices)):
                pass
            adapter = Adapter(name, load_id=next(self._load_ids), path=path, rank=folder.rank, image=image)
            if name in self._loaded:
                self.unload(name)
            self._loaded[name] = adapter
            return adapter

    def unload(self, name: str) -> Adapter:
        """Take an adapter's name away; raises ModelNotFoundError."""
        adapter = self.find(name)
        del self._loaded[name]
        adapter.retire()
        self._retired.append(adapter)
        return adapter

    def check_name(self, name: str, *, replaces: bool = False) -> None:
        """Raises InvalidRequestError for a name that `load` would refuse now."""
        if not name or len(name) > _MAX_NAME_LENGTH:
            raise InvalidRequestError(
                f"An adapter's name has 1 to {_MAX_NAME_LENGTH} characters.", param="lora_name"
            )
        if name in self.reserved_names:
            raise InvalidRequestError(f"{name!r} is the base model's name.", param="lora_name")
        if name in self._loaded and not replaces:
            raise InvalidRequestError(
                f"The adapter {name!r} is loaded already; unload it first, or set load_inplace.",
                param="lora_name",
            )
        self._retired = [adapter for adapter in self._retired if adapter.num_requests]
        num_present = len(self._loaded) + len(self._retired)
        if num_present >= self._max_adapters:
            leaving = f", {len(self._retired)} of them unloaded but still in use" if self._retired else ""
            raise InvalidRequestError(
                f"There are {num_present} adapters{leaving}, as many as --max-cpu-loras allows: "
                "unload one first.",
                param="lora_name",
            )


def _read_slice(slices: Iterator[None]) -> bool:
    """Read on for a moment; False when all is read. Raises CheckpointError."""
    deadline = time.perf_counter() + _SLICE_SECONDS
    try:
        for _ in slices:
            if time.perf_counter() >= deadline:
                return True
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"The adapter cannot be read: {error}.") from error
    return False
