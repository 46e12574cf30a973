"""The adapters that requests may name, and how they are loaded and unloaded while others are served.

Owns the names and the copies in host memory. Which adapter lies on the device is the scheduler's decision,
what a folder must hold `models/lora.py`'s.

A load reads on the device's worker, a few milliseconds at a time, so that steps come between. An unload
takes the name away at once: requests that were admitted keep the adapter to their end, and with the last of
them its memory is free for another. Two loads of one name are two adapters, also to the prefix cache.

Host memory is kept once it was made: to pin it, and to let it go, takes a card's driver many milliseconds.
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
from graphllm.errors import CheckpointError, ConfigError, InvalidRequestError, ModelNotFoundError
from graphllm.layers.lora import AdapterLayout
from graphllm.models.adapter_names import AdapterNames
from graphllm.models.lora import AdapterFolder
from graphllm.runner.device import Device

_SLICE_SECONDS = 0.003
_MAX_NAME_LENGTH = 200
_MAX_PATH_LENGTH = 4096


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
        # A copy to the device may still read one of these; nobody looks at what it brings there then.
        self._spare_images: list[torch.Tensor] = []
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
            where = _folder(path)
            folder = await self._device.run(
                lambda: AdapterFolder(where, self._names, max_rank=self._layout.max_rank)
            )
            image = await self._take_image()
            try:
                slices = folder.read_in_slices(image, self._layout)
                while await self._device.run(partial(_read_slice, slices)):
                    pass
            except Exception:  # not for a cancelled load: the worker may still be writing to it
                self._spare_images.append(image)
                raise
            adapter = Adapter(
                name,
                load_id=next(self._load_ids),
                path=path,
                rank=folder.rank,
                image=image,
                on_unused=self._spare_images.append,
            )
            if name in self._loaded:
                self.unload(name)
            self._loaded[name] = adapter
            return adapter

    async def _take_image(self) -> torch.Tensor:
        """Host memory for an adapter, of any content."""
        if self._spare_images:
            return self._spare_images.pop()
        num_bytes = self._layout.num_bytes
        try:
            # Not on the loop: to pin so much memory takes a card's driver tens of milliseconds.
            return await self._device.run(lambda: self._device.empty_host(num_bytes, dtype=torch.uint8))
        except (ConfigError, RuntimeError) as error:
            raise InvalidRequestError(f"There is no host memory for another adapter: {error}") from error

    def unload(self, name: str) -> Adapter:
        """Take an adapter's name away; raises ModelNotFoundError."""
        adapter = self.find(name)
        del self._loaded[name]
        adapter.retire()
        self._retired.append(adapter)
        return adapter

    def check_name(self, name: str, *, replaces: bool = False) -> None:
        """Raises InvalidRequestError for a name that `load` would refuse now."""
        if not name.isprintable() or not 0 < len(name) <= _MAX_NAME_LENGTH:
            raise InvalidRequestError(
                f"An adapter's name has 1 to {_MAX_NAME_LENGTH} printable characters.", param="lora_name"
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
    return any(time.perf_counter() >= deadline for _ in slices)


def _folder(path: str) -> Path:
    """Raises CheckpointError for a path that cannot be one."""
    if len(path) > _MAX_PATH_LENGTH or not path.isprintable():
        raise CheckpointError(
            f"{path[:_MAX_NAME_LENGTH]!r}...: a path has up to {_MAX_PATH_LENGTH} printable characters."
        )
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # "~somebody", whom nobody knows
        raise CheckpointError(f"{path}: {error}.") from error
