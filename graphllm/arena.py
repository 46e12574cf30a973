"""The memory of a step's intermediates: one address for each name, whatever the step.

Captured graphs bake addresses, so nothing that a captured step writes may be allocated while it is
captured. The largest step, run once, makes every buffer as large as it will ever be; `seal` then forbids
growth. Owns no persistent state: what is taken holds nothing from one step to the next.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Arena:
    """Buffers by name. Parts of a step that never live at once may share a name and so their memory."""

    __slots__ = ("_buffers", "_is_sealed", "_views", "device")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}
        self._is_sealed = False

    @property
    def num_bytes(self) -> int:
        return sum(buffer.numel() for buffer in self._buffers.values())

    def take(self, name: str, *size: int, dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of undefined finite values; the same name gives the same memory."""
        key = (name, size, dtype)
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = self._carve(name, size, dtype)
        return view

    def seal(self) -> None:
        """From now on every address is fixed: a request for more than there is fails."""
        self._is_sealed = True

    def _carve(self, name: str, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(size) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < num_bytes:
            assert not self._is_sealed, f"{name} needs {num_bytes} bytes, more than the largest step took"
            # Born zero: what nobody writes for padding stays a finite number.
            buffer = self._buffers[name] = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
            # Older views point to memory that is no longer anybody's.
            self._views = {key: view for key, view in self._views.items() if key[0] != name}
        return buffer[:num_bytes].view(dtype).view(size)
