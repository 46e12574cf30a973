"""A CUDA device: one compute stream, events, pinned host memory, graphs.

Owns the streams and what captures need of torch. Work is queued from the event loop's own thread, which
returns at once because CUDA is asynchronous; a thread exists only while a model is loaded, since reading
weights takes seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import torch

from graphllm.errors import ConfigError
from graphllm.runner.device import DeviceEvent, DeviceTimes, Graph, GraphCapture, Work, resolve_on_loop

logger = logging.getLogger(__name__)

T = TypeVar("T")


class _CudaEvent:
    """The end of one piece of work on the compute stream.

    Device times are turned into the host's clock when the end is noticed: exact in length, and late by
    as much as the loop was.
    """

    __slots__ = ("_begin", "_end", "_is_done", "error", "times")

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.times = DeviceTimes()
        self._begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._is_done = False

    def run(self, work: Work) -> None:
        try:
            self._begin.record()
            work()
        except Exception as error:
            self.error = error
        self._end.record()

    def query(self) -> bool:
        if self._is_done:
            return True
        try:
            self._is_done = self._end.query()  # type: ignore[no-untyped-call]
            if self._is_done:
                now = time.perf_counter()
                self.times = DeviceTimes(now - self._begin.elapsed_time(self._end) / 1e3, now)
        except RuntimeError as error:  # the card reports what went wrong in some kernel of this work
            self.error = self.error or error
            self._is_done = True
        return self._is_done


class CudaDevice:
    """One card. `submit` and the graphs belong to the event loop's thread."""

    must_poll = True
    graphs: CudaDevice

    def __init__(self, index: int = 0) -> None:
        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu or auto.")
        self.torch_device = torch.device("cuda", index)
        self.graphs = self
        torch.cuda.set_device(self.torch_device)
        # Sums of products stay in float32 to their end, also where cuBLAS splits them.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        self.stream = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        self._capture_stream = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        self._pool: Any = None
        self._primed_thread: int | None = None
        self.num_capture_allocations = 0

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """Torch work inside goes to the compute stream, in order with all submitted work."""
        with torch.cuda.stream(self.stream), torch.inference_mode():
            yield

    def submit(self, work: Work) -> DeviceEvent:
        event = _CudaEvent()
        with self.on_stream():
            event.run(work)
        return event

    def run(self, work: Callable[[], T]) -> Awaitable[T]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def load() -> T:
            torch.cuda.set_device(self.torch_device)
            with self.on_stream():
                result = work()
                self.stream.synchronize()
            return result

        thread = threading.Thread(
            target=resolve_on_loop, args=(loop, future, load), name="cuda-loader", daemon=True
        )
        thread.start()
        return future

    def empty_host(self, *size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=True)

    def watch(self, loop: asyncio.AbstractEventLoop, on_progress: Callable[[], None]) -> None:
        """Nothing calls: whoever waits asks `DeviceEvent.query`."""

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # a broken card has nothing left to finish
            self.stream.synchronize()

    # -- graphs -----------------------------------------------------------------------------------

    def begin_capture(self) -> GraphCapture:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if self._primed_thread != threading.get_ident():
            self._prime_capture_stream()
            self._primed_thread = threading.get_ident()
        return _CudaCapture(self, self._capture_stream, pool=self._pool)

    def count_allocations(self) -> int:
        """How often torch has given out device memory so far."""
        count: int = torch.cuda.memory_stats(self.torch_device).get("allocation.all.allocated", 0)
        return count

    def trim(self) -> None:
        torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.torch_device)[0]

    @property
    def total_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.torch_device)[1]

    def _prime_capture_stream(self) -> None:
        """cuBLAS gives a thread a workspace for each stream at its first product, which must not be inside a
        capture."""
        with torch.cuda.stream(self._capture_stream), torch.inference_mode():
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                square = torch.zeros(16, 16, dtype=dtype, device=self.torch_device)
                torch.mm(square, square)
            self._capture_stream.synchronize()


class _CudaCapture:
    """A capture in relaxed mode: between its slices the loop goes on launching and asking events.

    All that a captured step writes was allocated before. What is allocated all the same stays valid as long
    as the pool does, but it is memory that nobody planned: it is counted and reported.
    """

    def __init__(self, device: CudaDevice, stream: torch.cuda.Stream, *, pool: Any) -> None:
        self._device = device
        self._stream = stream
        self._pool = pool
        self._graph: torch.cuda.CUDAGraph | None = None

    @contextlib.contextmanager
    def slice(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream), torch.inference_mode():
            if self._graph is None:
                self._graph = torch.cuda.CUDAGraph()
                self._graph.capture_begin(pool=self._pool, capture_error_mode="relaxed")
            before = self._device.count_allocations()
            yield
            if allocated := self._device.count_allocations() - before:
                self._device.num_capture_allocations += allocated
                logger.warning("%d allocations inside a capture", allocated)

    def end(self) -> Graph:
        assert self._graph is not None, "nothing was captured"
        with torch.cuda.stream(self._stream):
            self._graph.capture_end()
        return self._graph

    def abandon(self) -> None:
        if self._graph is not None:
            with torch.cuda.stream(self._stream), contextlib.suppress(RuntimeError):
                self._graph.capture_end()
            self._graph = None
