"""An adapter's safetensors file, read while others are served.

Owns that nothing the file does meanwhile can harm the process: it is read, not mapped, because a mapped file
that becomes shorter ends whoever looks at it, and one that was written to meanwhile is refused. What its
tensors mean is `lora.py`'s.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import NoReturn

import torch

from graphllm.errors import CheckpointError
from graphllm.models.safetensors_folder import read_header

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class AdapterFile:
    """shapes: of the tensors, by name. Raises CheckpointError, naming the file, for a header that lies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            self.refuse("is not a regular file" if path.exists() else "is missing")
        self._identity = _identity(path.stat())
        self._tensors = read_header(path)
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def refuse(self, reason: str) -> NoReturn:
        """Raises CheckpointError."""
        raise CheckpointError(f"{self.path}: {reason}.")

    @contextmanager
    def opened(self) -> Iterator[BufferedReader]:
        """To `read` from. Raises CheckpointError where the file is not, or at the end was not, as it was."""
        with self.path.open("rb") as file:
            self._check_unchanged(file)
            yield file
            self._check_unchanged(file)

    def read(self, file: BufferedReader, name: str) -> torch.Tensor:
        """A tensor in its stored format, on the CPU. Raises CheckpointError."""
        stored = self._tensors[name]
        dtype = _DTYPES.get(stored.dtype)
        if dtype is None:
            self.refuse(f"tensor {name!r} holds {stored.dtype}; {', '.join(_DTYPES)} are what adapters hold")
        num_bytes = math.prod(stored.shape) * dtype.itemsize
        if stored.start < 0 or stored.end - stored.start != num_bytes:
            self.refuse(f"its header is damaged at tensor {name!r}")
        content = bytearray(num_bytes)
        file.seek(stored.start)
        if file.readinto(content) != num_bytes:
            self.refuse("it became shorter while it was read")
        return torch.frombuffer(content, dtype=dtype).view(stored.shape)

    def _check_unchanged(self, file: BufferedReader) -> None:
        if _identity(os.fstat(file.fileno())) != self._identity:
            self.refuse("it was written to while it was read")


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
