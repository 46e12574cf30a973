"""Captured steps: which there are, which come next, and what runs where one is missing.

Owns the bookkeeping of graphs. A step whose graph exists is one replay. One that has none runs kernel by
kernel at the same padded shape, is counted, and puts its graph on the list of wanted ones, so that graphs
are captured in the order that traffic asks for and nobody waits for one. A capture is done in slices of a
layer each, between which the event loop goes on serving.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from graphllm.attention.backend import AttentionBucket
from graphllm.batch import ScheduledBatch
from graphllm.runner.device import Graph, GraphCapture, GraphDevice
from graphllm.runner.sampler import SamplerKind
from graphllm.runner.step_program import StepProgram, StepShape
from graphllm.step_buckets import StepBuckets

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GraphKey:
    """What a graph holds: a forward of `shape` (None: no forward), then a sampler (None: no sampler).

    num_subset_pairs counts the pairs of a sampler that stands alone, 0 in all other graphs; is_masked says
    whether it applies masks. with_adapters: tokens of the forward may have one.
    """

    shape: StepShape | None
    sampler: SamplerKind | None
    num_subset_pairs: int = 0
    is_masked: bool = False
    with_adapters: bool = False


class GraphRunner:
    """Replays, captures and counts. Everything runs on the thread that launches steps.

    device None: nothing is ever captured, and steps run at their own sizes. max_bytes: device memory that
    graphs may take together; when it is used up the rest stays eager. is_foreign: the forward is that of a
    module that is not ours: steps with prompts are not captured, and run at their own sizes, and captures may
    allocate.
    """

    def __init__(
        self,
        program: StepProgram,
        buckets: StepBuckets,
        *,
        max_num_seqs: int,
        device: GraphDevice | None,
        max_bytes: int | None = None,
        is_foreign: bool = False,
    ) -> None:
        self._program = program
        self._is_foreign = is_foreign
        self._buckets = buckets
        self._max_num_seqs = max_num_seqs
        self._device = device
        self._max_bytes = max_bytes
        self._graphs: dict[GraphKey, Graph] = {}
        self._wanted: Counter[GraphKey] = Counter()
        self._refused: set[GraphKey] = set()
        self._pending: _PendingCapture | None = None
        self.force_eager = False
        self.num_misses = 0
        self.num_replays = 0
        self.num_bytes = 0

    @property
    def is_enabled(self) -> bool:
        return self._device is not None

    @property
    def num_captured(self) -> int:
        return len(self._graphs)

    @property
    def num_wanted(self) -> int:
        """Graphs that traffic has asked for and that are still to be captured."""
        return len(self._wanted)

    # -- shapes -----------------------------------------------------------------------------------

    def shape_of(self, batch: ScheduledBatch) -> StepShape:
        """The sizes at which `batch` runs: its bucket's, or its own where nothing is captured."""
        num_tokens, num_rows, num_pairs = batch.num_tokens, len(batch.rows), len(batch.pairs)
        if self._device is not None:
            is_decode = batch.num_decode_rows == num_rows
            size = self._buckets.decode_size(max(num_rows, num_pairs)) if is_decode else None
            if size is not None:
                return self.decode_shape(size)
            size = None if self._is_foreign else self._buckets.token_size(num_tokens)
            if size is not None:
                return self.mixed_shape(size)
        return StepShape(AttentionBucket(num_tokens, num_rows, batch.num_decode_rows), num_pairs)

    def decode_shape(self, num_rows: int) -> StepShape:
        """A step of `num_rows` rows of one token each, all of them sampled."""
        return StepShape(AttentionBucket(num_rows, num_rows, num_rows), num_rows)

    def mixed_shape(self, num_tokens: int) -> StepShape:
        """A step of `num_tokens` tokens in up to max_num_seqs rows of any length."""
        return StepShape(AttentionBucket(num_tokens, self._max_num_seqs, 0), self._max_num_seqs)

    def step_key(
        self, shape: StepShape, sampler: SamplerKind | None, *, with_adapters: bool = False
    ) -> GraphKey:
        """The key of a step. Of mixed steps there is one graph a size, whose sampler does greedy rows too."""
        if sampler is SamplerKind.GREEDY and not shape.bucket.is_decode and self._device is not None:
            sampler = SamplerKind.GENERAL
        return GraphKey(shape, sampler, with_adapters=with_adapters)

    def num_subset_pairs(self, num_pairs: int) -> int:
        """The padded number of pairs of a sampler that stands alone."""
        padded = self._buckets.decode_size(num_pairs) if self._device is not None else None
        return num_pairs if padded is None else padded

    def _is_captured_size(self, key: GraphKey) -> bool:
        """Whether the key is one of a bucket, and so worth a graph."""
        if key.shape is None:
            return key.num_subset_pairs in self._buckets.decode_sizes
        bucket = key.shape.bucket
        if bucket.is_decode:
            return bucket.num_rows in self._buckets.decode_sizes and key.shape.num_pairs == bucket.num_rows
        is_padded = bucket.num_rows == key.shape.num_pairs == self._max_num_seqs
        return not self._is_foreign and is_padded and bucket.num_tokens in self._buckets.token_sizes

    # -- running ----------------------------------------------------------------------------------

    def run(self, key: GraphKey) -> None:
        """Queue the work of `key`: its graph if there is one, else kernel by kernel, which is a miss."""
        graph = None if self.force_eager else self._graphs.get(key)
        if graph is not None:
            self.num_replays += 1
            graph.replay()
            return
        for _ in self._work(key):
            pass
        if self._device is not None:
            self.num_misses += 1
            if key not in self._refused and key not in self._graphs and self._is_captured_size(key):
                self._wanted[key] += 1

    def _work(self, key: GraphKey) -> Iterator[None]:
        if key.shape is not None:
            yield from self._program.forward_in_slices(key.shape, with_adapters=key.with_adapters)
            if key.sampler is not None:
                self._program.sample(key.shape.num_pairs, key.sampler)
        elif key.sampler is not None:
            self._program.sample_subset(key.num_subset_pairs, key.sampler, masked=key.is_masked)

    # -- capturing --------------------------------------------------------------------------------

    @property
    def num_capture_allocations(self) -> int:
        """Device memory allocated inside captures, which should never be, in times."""
        return 0 if self._device is None else self._device.num_capture_allocations

    def close(self) -> None:
        """Give up a capture under way; nothing is replayed any more."""
        if self._pending is not None:
            self._pending.capture.abandon()
            self._pending = None

    @property
    def has_captures_due(self) -> bool:
        return self._pending is not None or bool(self._wanted)

    def capture_slice(self) -> None:
        """Do about a layer's worth of the capture under way, or begin the most wanted one.

        Its kernels were launched before, by the step that wanted it, so nothing is compiled here.
        """
        if self._pending is None:
            key = self._most_wanted()
            if key is None:
                return
            assert self._device is not None, "graphs are wanted where they can be captured"
            capture = self._device.begin_capture(may_allocate=self._is_foreign)
            self._pending = _PendingCapture(key, self._work(key), capture, self._device.free_bytes())
        pending = self._pending
        try:
            if pending.step():
                return
            self._finish(pending)
        except Exception:
            logger.exception("a graph could not be captured; steps like it stay eager: %s", pending.key)
            pending.capture.abandon()
            self._refused.add(pending.key)
        self._pending = None

    def capture_all_in_slices(self) -> Iterator[tuple[int, int]]:
        """Capture what steady traffic needs, the largest first; yields (done, total) after each slice."""
        keys = self.default_keys()
        for done, key in enumerate(keys):
            for _ in self._capture_in_slices(key):
                yield done, len(keys)
        yield len(keys), len(keys)

    def capture_all(self) -> None:
        """The same at once."""
        for _ in self.capture_all_in_slices():
            pass

    def measure_bytes(self) -> int:
        """What all graphs of steady traffic will take, from the price of the two largest kinds of step.

        0 where the device cannot tell.
        """
        keys = self.default_keys()
        samples = keys[:1]
        if not self._is_foreign:
            samples.append(GraphKey(self.mixed_shape(self._buckets.token_sizes[-1]), SamplerKind.GENERAL))
        for key in samples:
            for _ in self._capture_in_slices(key):
                pass
        return self.num_bytes * len(keys) // len(samples)

    def default_keys(self) -> list[GraphKey]:
        """What steady traffic needs: decode steps, greedy and not, and mixed steps of every size.

        Where adapters can be served, all of it a second time, with them.
        """
        decode = [
            GraphKey(self.decode_shape(size), sampler)
            for size in reversed(self._buckets.decode_sizes)
            for sampler in (SamplerKind.GREEDY, SamplerKind.GENERAL)
        ]
        if self._is_foreign:
            return decode
        mixed = [
            GraphKey(self.mixed_shape(size), SamplerKind.GENERAL)
            for size in reversed(self._buckets.token_sizes)
        ]
        return [
            replace(key, with_adapters=with_adapters)
            for with_adapters in self._program.adapter_kinds
            for key in decode + mixed
        ]

    def _capture_in_slices(self, key: GraphKey) -> Iterator[None]:
        """Run the step once, on padding alone, so that its kernels are loaded; then capture it."""
        assert self._device is not None, "this device captures no graphs"
        if key in self._graphs or key in self._refused:
            return
        with self._device.on_stream():
            for _ in self._work(key):
                pass
        yield
        self._wanted = Counter({key: 1})
        while self.has_captures_due:
            self.capture_slice()
            yield

    def _most_wanted(self) -> GraphKey | None:
        if self._max_bytes is not None and self.num_bytes >= self._max_bytes and self._wanted:
            logger.warning(
                "graphs take %.0f MiB, all that was set aside: %d steps' shapes stay eager",
                self.num_bytes / 1024**2,
                len(self._wanted),
            )
            self._refused.update(self._wanted)
            self._wanted.clear()
        if not self._wanted:
            return None
        key = self._wanted.most_common(1)[0][0]
        del self._wanted[key]
        return key

    def _finish(self, pending: _PendingCapture) -> None:
        assert self._device is not None, "a capture is under way"
        self._graphs[pending.key] = pending.capture.end()
        self.num_bytes += max(0, pending.free_bytes - self._device.free_bytes())
        logger.debug("captured %s", pending.key)
        if not self._wanted:
            logger.info("%d graphs captured, %.0f MiB", len(self._graphs), self.num_bytes / 1024**2)


class _PendingCapture:
    """One capture under way. free_bytes: of the device before it, which may take memory from the start on."""

    __slots__ = ("_work", "capture", "free_bytes", "key")

    def __init__(self, key: GraphKey, work: Iterator[None], capture: GraphCapture, free_bytes: int) -> None:
        self.key = key
        self.capture = capture
        self.free_bytes = free_bytes
        self._work = work

    def step(self) -> bool:
        """Record the next slice; False when it was the last."""
        with self.capture.slice():
            return next(self._work, _END) is not _END


_END = object()
