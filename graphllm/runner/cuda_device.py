"""A CUDA device: one compute stream, two for copies, events, pinned host memory, graphs.

Owns the streams and what captures need of torch. Work is queued from the event loop's own thread, which
returns at once because CUDA is asynchronous; a thread exists only while a model is loaded, since reading
weights takes seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import mmap
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch

from graphllm.errors import ConfigError
from graphllm.runner.device import DeviceEvent, DeviceTimes, Graph, GraphCapture, Work, resolve_on_loop

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Up to here torch's own allocator of pinned memory serves, which rounds up to powers of two.
_MAX_ROUNDED_BYTES = 64 * 1024**2


# After so many seconds an event is too far away to be a reference: times between events are float32.
_LONGEST_REFERENCE = 5.0


class _DeviceClock:
    """The device's events on the host's clock.

    An event is noticed some time after it happened, never before. So the earliest that any event was
    noticed, counted from a reference, says best when the reference was, and a loop that is late once does
    not make every later time late.
    """

    def __init__(self) -> None:
        self._reference: Any = None
        self._reference_time = 0.0

    def time_of(self, event: Any, *, noticed: float) -> float:
        """When `event`, which has completed, happened, in seconds of `time.perf_counter`."""
        if self._reference is None:
            self._reference, self._reference_time = event, noticed
            return noticed
        since: float = self._reference.elapsed_time(event) / 1e3
        self._reference_time = min(self._reference_time, noticed - since)
        happened = self._reference_time + since
        if since > _LONGEST_REFERENCE:
            self._reference, self._reference_time = event, happened
        return happened


class _CudaEvent:
    """The beginning and end of one piece of work on the stream that was current."""

    __slots__ = ("_begin", "_clock", "_end", "_is_done", "error", "times")

    def __init__(self, clock: _DeviceClock) -> None:
        self.error: BaseException | None = None
        self.times = DeviceTimes()
        self._clock = clock
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
                end = self._clock.time_of(self._end, noticed=time.perf_counter())
                self.times = DeviceTimes(end - self._begin.elapsed_time(self._end) / 1e3, end)
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
        # One for each direction: the bus carries both at once, and copies out wait for steps.
        self._copy_streams: dict[bool, Any] = {
            behind_steps: torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
            for behind_steps in (False, True)
        }
        self._capture_stream = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]
        self._clock = _DeviceClock()
        self._pool: Any = None
        self._thread = threading.local()
        self.num_capture_allocations = 0
        # Every graph ever begun. The last one of a pool takes the pool with it, and any one that is destroyed
        # takes cuBLAS's workspace on the capture stream, whose address all the others have baked in
        # (pytorch#193402), so they are let go together.
        self.all_graphs: list[torch.cuda.CUDAGraph] = []

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """Torch work inside goes to the compute stream, in order with all submitted work."""
        with torch.cuda.stream(self.stream), torch.inference_mode():
            yield

    def submit(self, work: Work) -> DeviceEvent:
        # The driver's queue of launches has a bound of about a thousand: two large steps without graphs can
        # fill it, and then this waits for room.
        event = _CudaEvent(self._clock)
        with self.on_stream():
            event.run(work)
        return event

    def submit_copy(self, work: Work, *, behind_steps: bool) -> DeviceEvent:
        event = _CudaEvent(self._clock)
        stream = self._copy_streams[behind_steps]
        if behind_steps:
            stream.wait_stream(self.stream)
        with torch.cuda.stream(stream), torch.inference_mode():
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
        num_bytes = math.prod(size) * dtype.itemsize
        if num_bytes <= _MAX_ROUNDED_BYTES:
            return torch.empty(size, dtype=dtype, pin_memory=True)
        memory = np.frombuffer(mmap.mmap(-1, num_bytes), dtype=np.uint8)  # begins at a page, as CUDA wants
        address = memory.ctypes.data
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if runtime.cudaHostRegister(address, num_bytes, 0) != runtime.cudaError.success:
            raise ConfigError(
                f"{num_bytes / 1024**3:.2f} GiB of host memory could not be pinned: lower --swap-space or "
                "--kv-offloading-size, or raise the limit on locked memory (ulimit -l)."
            )
        # Runs before the array lets go of the pages, which the tensor keeps alive.
        weakref.finalize(memory, runtime.cudaHostUnregister, address)
        return torch.from_numpy(memory).view(dtype).view(size)

    def watch(self, loop: asyncio.AbstractEventLoop, on_progress: Callable[[], None]) -> None:
        """Nothing calls: whoever waits asks `DeviceEvent.query`."""

    def close(self) -> None:
        for stream in (self.stream, *self._copy_streams.values()):
            with contextlib.suppress(RuntimeError):  # a broken card has nothing left to finish
                stream.synchronize()
        self.all_graphs.clear()

    # -- graphs -----------------------------------------------------------------------------------

    def begin_capture(self, *, may_allocate: bool = False) -> GraphCapture:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if not getattr(self._thread, "is_primed", False):
            self._prime_capture_stream()
            self._thread.is_primed = True
        return _CudaCapture(self, self._capture_stream, pool=self._pool, may_allocate=may_allocate)

    def count_allocations(self) -> int:
        """How often torch has given out device memory so far."""
        # What torch.cuda.memory_stats is made of; itself it flattens and sorts every figure at each call.
        count: int = torch._C._cuda_memoryStats(self.torch_device.index)["allocation"]["all"]["allocated"]
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
                torch.addmm(square[0], square, square)


class _CudaCapture:
    """A capture in relaxed mode: between its slices the loop goes on launching and asking events.

    All that a captured step of ours writes was allocated before. What is allocated all the same stays valid
    as long as the pool does, but it is memory that nobody planned: it is counted and reported, unless it was
    said beforehand that it may be (may_allocate).
    """

    def __init__(
        self, device: CudaDevice, stream: torch.cuda.Stream, *, pool: Any, may_allocate: bool
    ) -> None:
        self._device = device
        self._may_allocate = may_allocate
        self._stream = stream
        self._pool = pool
        self._graph: torch.cuda.CUDAGraph | None = None

    @contextlib.contextmanager
    def slice(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream), torch.inference_mode():
            if self._graph is None:
                self._begin()
            before = self._device.count_allocations()
            yield
            allocated = self._device.count_allocations() - before
            if allocated and not self._may_allocate:
                self._device.num_capture_allocations += allocated
                logger.warning("%d allocations inside a capture", allocated)

    def end(self) -> Graph:
        assert self._graph is not None, "nothing was captured"
        with torch.cuda.stream(self._stream):
            self._graph.capture_end()
        return self._graph

    def abandon(self) -> None:
        with torch.cuda.stream(self._stream):
            if self._graph is not None:
                with contextlib.suppress(RuntimeError):
                    self._graph.capture_end()
            # What went wrong in a capture stays the thread's last error until somebody asks.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=self._device.torch_device)

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        self._device.all_graphs.append(graph)
        graph.capture_begin(pool=self._pool, capture_error_mode="relaxed")
        self._graph = graph
