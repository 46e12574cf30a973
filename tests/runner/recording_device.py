"""A device that captures graphs without a card: what a capture would record is recorded, and replayed.

Inside a capture nothing runs. Torch operations that write to memory that was there before are recorded with
the addresses they were called with, kernels likewise under Triton's interpreter; a replay does exactly the
same again. So whatever Python number of the step was baked in is baked in here too, and gives wrong tokens
for the next step. What a card would refuse or get wrong fails here:

- an allocation inside a capture that may not allocate, and any read of a device value on the host;
- a replay that touches memory which is no longer one of the engine's persistent addresses.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from graphllm.runner.device import Graph, GraphCapture, InlineDevice

Operation = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
GRAPH_BYTES = 1024**2


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class CaptureError(AssertionError):
    """What a card would refuse inside a capture."""


class _Recorder(TorchDispatchMode):
    """pool: addresses of the memory that captures allocate, None where they may not."""

    def __init__(self, operations: list[Operation], pool: set[int] | None) -> None:
        super().__init__()
        self._operations = operations
        self._pool = pool

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        written = [
            argument
            for argument in schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if written:
            self._operations.append((func, args, kwargs))
            values = {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **kwargs}
            return values[written[0].name]
        if any(returned.alias_info is not None for returned in schema.returns):
            made = func(*args, **kwargs)
            given = {address(tensor) for tensor in tensors_in((args, kwargs))}
            if all(address(tensor) in given for tensor in tensors_in(made)):
                return made  # a view, or several: no work for the device
        if self._pool is None or _reads_values(func, args):
            raise CaptureError(f"{func} inside a capture: it allocates, or reads a value on the host")
        return self._allocated(func, args, kwargs)

    def _allocated(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A result in memory of the pool, where every replay puts it again; until then it is NaN."""
        made = func(*args, **kwargs)
        assert isinstance(made, torch.Tensor), f"{func} has several results"

        def again(*args: Any, **kwargs: Any) -> None:
            made.copy_(func(*args, **kwargs))

        again.__name__ = str(func)
        made.fill_(torch.nan if made.is_floating_point() else 0)
        assert self._pool is not None
        self._pool.add(address(made))
        self._operations.append((again, args, kwargs))
        return made


def _reads_values(func: Any, args: tuple[Any, ...]) -> bool:
    if func is torch.ops.aten.index.Tensor:
        return any(index.dtype == torch.bool for index in tensors_in(args[1]))
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


class RecordedGraph:
    """Operations with the addresses that they were captured with."""

    def __init__(self, operations: list[Operation], device: RecordingDevice) -> None:
        self.operations = operations
        self.num_replays = 0
        self._device = device

    def replay(self) -> None:
        self.num_replays += 1
        if self._device.persistent is not None:
            living = {address(tensor) for tensor in self._device.persistent()}
            self._check_addresses(living | self._device.pool)
        for function, args, kwargs in self.operations:
            function(*args, **kwargs)

    def _check_addresses(self, living: set[int]) -> None:
        for function, args, kwargs in self.operations:
            for tensor in tensors_in((args, kwargs)):
                assert address(tensor) in living, (
                    f"{getattr(function, '__name__', function)} touches an address that is nobody's any "
                    f"more: {list(tensor.shape)} {tensor.dtype}"
                )


class RecordedCapture:
    def __init__(self, device: RecordingDevice, *, may_allocate: bool) -> None:
        self._device = device
        self._pool = device.pool if may_allocate else None
        self._operations: list[Operation] = []

    @contextlib.contextmanager
    def slice(self) -> Iterator[None]:
        assert not self._device.is_capturing, "a capture inside a capture"
        self._device.is_capturing = True
        run = InterpretedFunction.run

        def record(kernel: InterpretedFunction, *args: Any, **kwargs: Any) -> None:
            launch = functools.partial(run, kernel)
            launch.__name__ = kernel.fn.__name__  # type: ignore[attr-defined]
            self._operations.append((launch, args, kwargs))

        InterpretedFunction.run = record
        try:
            with torch.inference_mode(), _Recorder(self._operations, self._pool):
                yield
        finally:
            InterpretedFunction.run = run
            self._device.is_capturing = False

    def end(self) -> Graph:
        graph = RecordedGraph(self._operations, self._device)
        self._device.graphs_made.append(graph)
        return graph

    def abandon(self) -> None:
        self._operations.clear()


class RecordingDevice(InlineDevice):
    """Work is done when it is submitted; captures are recorded.

    `persistent` is set by the test: every tensor whose address the engine promises to keep. Until then
    replays are not checked.
    """

    def __init__(self, *, total_bytes: int = 64 * 1024**3) -> None:
        super().__init__()
        self.graphs = self
        self.total_bytes = total_bytes
        self.is_capturing = False
        self.num_capture_allocations = 0
        self.graphs_made: list[RecordedGraph] = []
        self.pool: set[int] = set()
        self.persistent: Callable[[], Iterable[torch.Tensor]] | None = None

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        with torch.inference_mode():
            yield

    def begin_capture(self, *, may_allocate: bool = False) -> GraphCapture:
        return RecordedCapture(self, may_allocate=may_allocate)

    def trim(self) -> None:
        """Nothing is held in reserve."""

    def free_bytes(self) -> int:
        return self.total_bytes // 2 - GRAPH_BYTES * len(self.graphs_made)
