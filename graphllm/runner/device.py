"""What differs between devices, and the only place where a thread may start.

Owns the stream of work and the events that mark its progress. The CPU is dressed as an asynchronous
device: one worker thread stands in for the stream, so that look-ahead and fences are exercised
without a GPU, and a file descriptor tells the event loop of each completed piece of work (polling
would steal the worker's core). `InlineDevice` does each piece of work at once, for deterministic
tests.

Work is a callable that touches device tensors. It is handed over in stream order and must read its
host inputs (staging memory) when it runs, as a copy engine would, not when it is submitted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")
Work = Callable[[], None]


@dataclass(frozen=True, slots=True)
class DeviceTimes:
    """When the device began and ended a piece of work, in seconds of `time.perf_counter`."""

    start: float = 0.0
    end: float = 0.0


class DeviceEvent(Protocol):
    """Marks the end of one piece of submitted work."""

    @property
    def times(self) -> DeviceTimes:
        """Known once `query` has said True."""

    @property
    def error(self) -> BaseException | None:
        """What the work raised; None while it runs and when it went well."""

    def query(self) -> bool:
        """Whether the work has ended. Never blocks."""


class Graph(Protocol):
    """Device work that was captured, to be queued again as a whole."""

    def replay(self) -> None: ...


class GraphCapture(Protocol):
    """A capture under way. Work inside `slice` is recorded, not done; between slices all else goes on."""

    def slice(self) -> AbstractContextManager[None]: ...

    def end(self) -> Graph: ...

    def abandon(self) -> None:
        """Give up after an error in a slice."""


class GraphDevice(Protocol):
    """The part of a device that captures graphs.

    num_capture_allocations counts what should never be: device memory allocated inside a capture, but for
    those that `may_allocate`. What they allocate belongs to the graphs.
    """

    def on_stream(self) -> AbstractContextManager[None]:
        """Torch work inside is queued in order with all submitted work."""

    num_capture_allocations: int

    def begin_capture(self, *, may_allocate: bool = False) -> GraphCapture: ...

    def trim(self) -> None:
        """Give back memory that is held in reserve. Waits for the device: not while serving."""

    def free_bytes(self) -> int:
        """Device memory that nobody holds, not even in reserve."""

    @property
    def total_bytes(self) -> int: ...


class Device(Protocol):
    """A stream of work on some processor, in order, beside the event loop.

    must_poll: nothing calls when work ends, so whoever waits has to ask. graphs: None where the device
    captures none.
    """

    torch_device: torch.device
    must_poll: bool

    @property
    def graphs(self) -> GraphDevice | None: ...

    def submit(self, work: Work) -> DeviceEvent:
        """Queue `work` behind all earlier work. Never blocks."""

    def submit_copy(self, work: Work, *, behind_steps: bool) -> DeviceEvent:
        """Queue `work` beside what is submitted otherwise, which never waits for it. Never blocks.

        Copies of one kind are done in their order. behind_steps: not before all work submitted so far.
        """

    def run(self, work: Callable[[], T]) -> Awaitable[T]:
        """Long host work (loading a model) off the event loop, in the same order."""

    def empty_host(self, *size: int, dtype: torch.dtype) -> torch.Tensor:
        """Host memory that the device can copy from and to without blocking."""

    def watch(self, loop: asyncio.AbstractEventLoop, on_progress: Callable[[], None]) -> None:
        """Call `on_progress` on `loop` soon after submitted work has ended."""

    def close(self) -> None:
        """End the device; queued work is finished first."""


class _WorkEvent:
    """Set by the thread that does the work; read by the event loop."""

    __slots__ = ("_done", "error", "times")

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.times = DeviceTimes()
        self._done = False

    def query(self) -> bool:
        return self._done

    def run(self, work: Work) -> None:
        start = time.perf_counter()
        try:
            work()
        except Exception as error:
            self.error = error
        finally:
            self.times = DeviceTimes(start, time.perf_counter())
            self._done = True


class InlineDevice:
    """Work is done when it is submitted, on the caller's thread."""

    must_poll = False

    graphs: GraphDevice | None = None

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def submit(self, work: Work) -> DeviceEvent:
        event = _WorkEvent()
        with torch.inference_mode():
            event.run(work)
        return event

    def submit_copy(self, work: Work, *, behind_steps: bool) -> DeviceEvent:
        return self.submit(work)

    async def run(self, work: Callable[[], T]) -> T:
        with torch.inference_mode():
            return work()

    def empty_host(self, *size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype)

    def watch(self, loop: asyncio.AbstractEventLoop, on_progress: Callable[[], None]) -> None:
        """Nothing to watch: work has ended before anyone could wait for it."""

    def close(self) -> None:
        """Nothing to close."""


class CpuDevice:
    """One worker thread as the stream; `num_threads` threads inside each torch operation."""

    must_poll = False
    graphs: GraphDevice | None = None

    def __init__(self, num_threads: int | None = None) -> None:
        self.torch_device = torch.device("cpu")
        self.num_threads = num_threads or len(os.sched_getaffinity(0))
        self._queue: queue.SimpleQueue[tuple[_WorkEvent, Work] | None] = queue.SimpleQueue()
        self._read_fd, self._write_fd = _notification_fds()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker = threading.Thread(target=self._work, name="cpu-device", daemon=True)
        self._worker.start()

    def submit(self, work: Work) -> DeviceEvent:
        event = _WorkEvent()
        self._queue.put((event, work))
        return event

    def submit_copy(self, work: Work, *, behind_steps: bool) -> DeviceEvent:
        # A second worker would take the first one's cores, and copies are short.
        return self.submit(work)

    def run(self, work: Callable[[], T]) -> Awaitable[T]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        self.submit(lambda: resolve_on_loop(loop, future, work))
        return future

    def empty_host(self, *size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype)

    def watch(self, loop: asyncio.AbstractEventLoop, on_progress: Callable[[], None]) -> None:
        def drain_and_call() -> None:
            with contextlib.suppress(BlockingIOError):
                os.read(self._read_fd, 4096)
            on_progress()

        self._loop = loop
        loop.add_reader(self._read_fd, drain_and_call)

    def close(self) -> None:
        self._queue.put(None)
        self._worker.join()
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._read_fd)
        for fd in {self._read_fd, self._write_fd}:
            os.close(fd)

    def _work(self) -> None:
        # The number of threads of an operation belongs to the thread that calls it.
        torch.set_num_threads(self.num_threads)
        with torch.inference_mode():
            while (item := self._queue.get()) is not None:
                event, work = item
                event.run(work)
                del item, work  # or the last step's tensors live until the next one
                with contextlib.suppress(BlockingIOError):  # the pipe is full: the loop knows already
                    os.write(self._write_fd, _ONE)


_ONE = (1).to_bytes(8, "little")


def _notification_fds() -> tuple[int, int]:
    """(read, write) descriptors, not blocking; both accept the same eight bytes."""
    if hasattr(os, "eventfd"):
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return fd, fd
    read_fd, write_fd = os.pipe()
    os.set_blocking(read_fd, False)
    os.set_blocking(write_fd, False)
    return read_fd, write_fd


def resolve_on_loop(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[T], work: Callable[[], T]
) -> None:
    """Do `work` on the calling thread, and tell the loop's `future` how it went."""

    def resolve(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # no error: it is a T

    try:
        result = work()
    except BaseException as error:
        _call_soon(loop, resolve, None, error)
    else:
        _call_soon(loop, resolve, result, None)


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *arguments: object) -> None:
    with contextlib.suppress(RuntimeError):  # the loop closed meanwhile: nobody waits
        loop.call_soon_threadsafe(callback, *arguments)


def open_device(name: str, *, cpu_threads: int | None = None) -> Device:
    """The device for `--device`; "auto" takes a CUDA device where there is one. Raises ConfigError."""
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        # Here, not above: its file needs the protocols of this one.
        from graphllm.runner.cuda_device import CudaDevice

        return CudaDevice()
    return CpuDevice(cpu_threads)
