"""Turns a scheduled batch into device work, and device work into a step's result.

Owns the handles of steps in flight and what is queued for a step: uploads, block copies, the step's program
(a graph where there is one), and the copy of its results to the host. Decides nothing about what runs:
that is the scheduler's.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from graphllm.batch import SamplePair, ScheduledBatch, StepResult
from graphllm.cache.kv_cache import KVCache
from graphllm.errors import StepFailedError
from graphllm.outputs import TokenLogprob
from graphllm.runner.device import Device, DeviceEvent, DeviceTimes
from graphllm.runner.graph_runner import GraphKey, GraphRunner
from graphllm.runner.sampler import SamplerKind, SamplerVariant
from graphllm.runner.staging import StagingEntry, StagingRing, download, upload, upload_subset
from graphllm.runner.step_program import StepProgram, StepShape
from graphllm.runner.step_reports import download_scores, read_scores, upload_scores
from graphllm.runner.text_pooling import read_results

MaskRow = npt.NDArray[np.int32]


class StepHandle:
    """A step in flight. `sample` only where pairs were held back; then `ready`, `result`.

    held_rows: the held pairs, each with its mask row, [ceil(vocab_size / 32)] int32 in the memory that the
    device copies from. A row is filled with ones when the iterator comes to it: bit t % 32 of word t // 32
    is token t, and a set bit allows it. The caller clears bits before `sample`.
    """

    __slots__ = ("_entry", "_events", "_held", "_runner", "batch", "held_rows", "shape")

    def __init__(
        self, runner: ModelRunner, batch: ScheduledBatch, *, entry: StagingEntry, shape: StepShape
    ) -> None:
        self.batch = batch
        self.shape = shape
        self._runner = runner
        self._entry = entry
        self._events: list[DeviceEvent] = []
        self._held = [index for index, pair in enumerate(batch.pairs) if pair.held]
        self.held_rows = self._open_rows() if self._held else iter(())

    @property
    def is_held(self) -> bool:
        """Whether pairs wait for `sample`."""
        return len(self._held) > 0

    def sample(self) -> None:
        """Sample the held pairs with the masks as they are now; a row that nobody asked for allows all.

        To be called before the next step is launched, whose forward reuses the logits.
        """
        assert self._held, "no pair was held back"
        for _ in self.held_rows:
            pass
        self._runner._submit_subset(self, self._held, phase=1, masked=True)
        self._held = []
        self._runner._submit_reports(self)

    def _open_rows(self) -> Iterator[tuple[SamplePair, MaskRow]]:
        masks = self._runner.host_masks(self._entry).numpy()
        for line, index in enumerate(self._held):
            row = masks[line]
            row.fill(-1)
            yield self.batch.pairs[index], row

    def ready(self) -> bool:
        """Whether `result` returns at once. Never blocks; never true while pairs are held back."""
        return not self._held and all(event.query() for event in self._events)

    @property
    def times(self) -> DeviceTimes:
        """When the device began and ended the step; known when it is ready."""
        return DeviceTimes(self._events[0].times.start, self._events[-1].times.end)

    def result(self) -> StepResult:
        """The step's tokens; frees its staging memory. Call once, when ready.

        Raises StepFailedError when the device's work failed.
        """
        assert self.ready(), "the step is still running"
        entry = self._entry
        entry.in_use = False
        for event in self._events:
            if event.error is not None:
                self._runner.forget_device_rows()
                raise StepFailedError(f"The step failed on the device: {event.error}") from event.error
        token_ids = entry.results.token_ids[: len(self.batch.pairs)].tolist()
        logprobs = [_token_logprob(entry, line, pair) for line, pair in enumerate(self.batch.pairs)]
        return StepResult(
            self.batch.step_id,
            token_ids,
            logprobs,
            scores=read_scores(self.batch.spans, entry.scores),
            pooled=read_results(entry.pooled_lines, entry.pooled.results) if entry.pooled_lines else {},
        )


class ModelRunner:
    """One model on one device: `launch(batch)` returns at once."""

    def __init__(
        self,
        program: StepProgram,
        graphs: GraphRunner,
        *,
        device: Device,
        staging: StagingRing,
        kv_cache: KVCache,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.program = program
        self.graphs = graphs
        self.kv_cache = kv_cache
        self.buffers = program.buffers
        self.arena = program.arena
        self._device = device
        self._staging = staging
        self._eos_token_ids = eos_token_ids
        self._held_back: StepHandle | None = None
        # Of whole steps and free pairs, and of held pairs: the two take turns where a step has both.
        self._variant_of: dict[bool, tuple[tuple[tuple[int, int], ...], SamplerVariant]] = {}

    def launch(self, batch: ScheduledBatch) -> StepHandle:
        """Hand the step to the device. Never blocks; errors of the device surface in `result`."""
        assert self._held_back is None or not self._held_back._held, "the last step is not sampled yet"
        shape = self.graphs.shape_of(batch)
        entry = self._staging.stage(batch, shape=shape, eos_token_ids=self._eos_token_ids)
        handle = StepHandle(self, batch, entry=entry, shape=shape)
        self._held_back = handle if handle._held else None
        variant = None if handle._held or not batch.pairs else self._variant(batch.pairs)
        handle._events.append(self._device.submit(partial(self._step, handle, variant)))
        if handle._held and len(handle._held) < len(batch.pairs):
            free = [index for index, pair in enumerate(batch.pairs) if not pair.held]
            self._submit_subset(handle, free, phase=0, masked=False)
        if not handle._held:
            self._submit_reports(handle)
        return handle

    def replay_decode(self, num_rows: int) -> None:
        """Queue a greedy decode step of that bucket on the slot tables as they are: for measurements."""
        key = self.graphs.step_key(self.graphs.decode_shape(num_rows), SamplerKind.GREEDY)
        self._device.submit(partial(self.graphs.run, key))

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """The stream that steps run on; None where the device is no card."""
        return getattr(self._device, "stream", None)

    def forget_device_rows(self) -> None:
        """After a failed step the device's row vectors are unknown."""
        self._staging.forget_rows()

    def host_masks(self, entry: StagingEntry) -> torch.Tensor:
        """An entry's masks, [max_num_seqs, words] int32 on the host."""
        return self._staging.masks_of(entry, num_words=self.buffers.masks.shape[1])

    def _submit_subset(self, handle: StepHandle, pairs: list[int], *, phase: int, masked: bool) -> None:
        """Queue the sample phase of some of a step's pairs."""
        variant = self._variant([handle.batch.pairs[index] for index in pairs], held=masked)
        num_padded = self.graphs.num_subset_pairs(len(pairs))
        slots = [handle.batch.pairs[index].slot for index in pairs]
        self._staging.stage_subset(
            handle._entry, phase, lines=pairs, slots=slots, num_padded=num_padded, masked=masked
        )
        work = partial(self._sample_subset, handle, num_padded, phase, variant, masked)
        handle._events.append(self._device.submit(work))

    def _submit_reports(self, handle: StepHandle) -> None:
        """Queue what the step reports beside tokens: last of all, because it takes the logits' memory."""
        if handle.batch.spans or handle._entry.pooled_lines:
            handle._events.append(self._device.submit(partial(self._report, handle)))

    def _variant(self, pairs: list[SamplePair], *, held: bool = False) -> SamplerVariant:
        key = tuple((pair.slot, pair.generation) for pair in pairs)
        known = self._variant_of.get(held)
        if known is None or known[0] != key:
            known = (key, SamplerVariant.of(pair.sequence.params for pair in pairs))
            self._variant_of[held] = known
        return known[1]

    # -- on the device ----------------------------------------------------------------------------

    def _step(self, handle: StepHandle, variant: SamplerVariant | None) -> None:
        """Uploads, block copies, the program; without a variant the pairs are sampled later."""
        entry, shape, buffers = handle._entry, handle.shape, self.buffers
        upload(entry, buffers)
        if entry.copies.num_rows:
            self.kv_cache.copy_blocks(entry.copies.to(buffers.rows.device))  # [num_copies, 2] int64
        if self.program.runs_kernels:
            kind = None if variant is None else variant.kind
            if not handle.batch.pairs and shape.num_pairs:
                # In the middle of a prompt nothing is sampled but padding: one graph serves both.
                kind = SamplerKind.GENERAL
            with_adapters = handle.batch.uses_adapters
            self.graphs.run(self.graphs.step_key(shape, kind, with_adapters=with_adapters))
        else:
            self.program.forward(shape, with_adapters=handle.batch.uses_adapters)
            if variant is not None:
                self.program.sample_by_reference(shape.num_pairs, variant)
        if variant is not None:
            self._download(handle, variant)

    def _sample_subset(
        self, handle: StepHandle, num_padded: int, phase: int, variant: SamplerVariant, is_masked: bool
    ) -> None:
        if handle._events[0].error is not None:
            return
        upload_subset(handle._entry, phase, self.buffers, num_pairs=num_padded, masked=is_masked)
        if self.program.runs_kernels:
            self.graphs.run(
                GraphKey(
                    None,
                    SamplerKind.GENERAL if variant.kind is SamplerKind.GREEDY else variant.kind,
                    num_subset_pairs=num_padded,
                    is_masked=is_masked,
                )
            )
        else:
            self.program.sample_subset_by_reference(num_padded, variant, masked=is_masked)
        self._download(handle, variant)

    def _report(self, handle: StepHandle) -> None:
        if handle._events[0].error is not None:
            return
        entry, num_tokens = handle._entry, handle.shape.bucket.num_tokens
        if entry.pooled_lines:
            results = self.program.pool(entry.pooled.to(self.arena.device), num_tokens=num_tokens)
            entry.pooled.results[: len(results)].copy_(results, non_blocking=True)
        if handle.batch.spans:
            upload_scores(entry.scores, self.buffers.scores)
            num_top = max(span.sequence.params.prompt_logprobs or 0 for span in handle.batch.spans)
            self.program.score(entry.num_scored, num_tokens=num_tokens, num_top=num_top)
            download_scores(self.buffers.scores, entry.scores, num_lines=entry.num_scored)

    def _download(self, handle: StepHandle, variant: SamplerVariant) -> None:
        download(
            handle._entry,
            self.buffers,
            num_pairs=len(handle.batch.pairs),
            with_logprobs=variant.num_logprobs is not None,
        )


def _token_logprob(entry: StagingEntry, line: int, pair: SamplePair) -> TokenLogprob | None:
    count = pair.sequence.params.logprobs
    if count is None:
        return None
    results = entry.results
    top_ids = results.top_ids[line, :count].tolist()
    top_logprobs = results.top_logprobs[line, :count].tolist()
    return TokenLogprob(
        int(results.token_ids[line]),
        float(results.logprobs[line]),
        tuple(zip(top_ids, top_logprobs, strict=True)),
    )
