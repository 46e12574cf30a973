"""Turns a scheduled batch into device work, and device work into a step's result.

Owns the two phases of a step (forward, into persistent logits; sample, into the slot tables and the
result ring) and the handles of steps in flight. Decides nothing about what runs: that is the
scheduler's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import torch

from graphllm.attention.backend import AttentionBackend, AttentionBucket, AttentionInputs
from graphllm.batch import SamplePair, ScheduledBatch, StepResult
from graphllm.cache.kv_cache import KVCache
from graphllm.errors import StepFailedError
from graphllm.models.decoder import Decoder
from graphllm.outputs import TokenLogprob
from graphllm.runner.device import Device, DeviceEvent
from graphllm.runner.sampler import SamplerVariant, sample
from graphllm.runner.step_buffers import StagingEntry, StagingRing, StepBuffers, download, upload


@dataclass(slots=True)
class _DeviceTimes:
    """When the device began and ended a step, on the `time.perf_counter` clock."""

    start: float = 0.0
    end: float = 0.0


class StepHandle:
    """A step in flight. `sample(masks)` only where pairs were held back; then `ready`, `result`."""

    __slots__ = ("_entry", "_events", "_held", "_runner", "batch", "times")

    def __init__(self, runner: ModelRunner, batch: ScheduledBatch, *, entry: StagingEntry) -> None:
        self.batch = batch
        self.times = _DeviceTimes()
        self._runner = runner
        self._entry = entry
        self._events: list[DeviceEvent] = []
        self._held = [index for index, pair in enumerate(batch.pairs) if pair.held]

    def sample(self, masks: torch.Tensor) -> None:
        """Sample the held pairs. masks: [num_held, ceil(vocab_size / 32)] int32, bit set = allowed.

        To be called before the next step is launched, whose forward reuses the logits.
        """
        assert self._held, "no pair was held back"
        self._events.append(self._runner.submit_sample(self, self._held, masks=masks))
        self._held = []

    def ready(self) -> bool:
        """Whether `result` returns at once. Never blocks; never true while pairs are held back."""
        return not self._held and all(event.query() for event in self._events)

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
                raise StepFailedError(f"The model step failed: {event.error}") from event.error
        token_ids = entry.token_ids[: len(self.batch.pairs)].tolist()
        logprobs = [_token_logprob(entry, line, pair) for line, pair in enumerate(self.batch.pairs)]
        return StepResult(self.batch.step_id, token_ids, logprobs)


class ModelRunner:
    """One model on one device: `launch(batch)` returns at once."""

    def __init__(
        self,
        model: Decoder,
        *,
        backend: AttentionBackend,
        device: Device,
        buffers: StepBuffers,
        staging: StagingRing,
        kv_cache: KVCache,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.model = model
        self.kv_cache = kv_cache
        self.buffers = buffers
        self._backend = backend
        self._device = device
        self._staging = staging
        self._eos_token_ids = eos_token_ids
        self._block_size = kv_cache.shape.block_size
        self._held_back: StepHandle | None = None
        self._variant_of: tuple[tuple[tuple[int, int], ...], SamplerVariant] | None = None

    def launch(self, batch: ScheduledBatch) -> StepHandle:
        """Hand the step to the device. Never blocks; errors of the device surface in `result`."""
        assert self._held_back is None or not self._held_back._held, "the last step is not sampled yet"
        entry = self._staging.stage(batch, eos_token_ids=self._eos_token_ids)
        handle = StepHandle(self, batch, entry=entry)
        handle._events.append(self._device.submit(partial(self._forward, batch, entry, handle.times)))
        self._held_back = handle if handle._held else None
        if not handle._held:
            handle._events.append(self.submit_sample(handle, None, masks=None))
        elif len(handle._held) < len(batch.pairs):
            free = [index for index, pair in enumerate(batch.pairs) if not pair.held]
            handle._events.append(self.submit_sample(handle, free, masks=None))
        return handle

    def submit_sample(
        self, handle: StepHandle, pairs: list[int] | None, *, masks: torch.Tensor | None
    ) -> DeviceEvent:
        """Queue the sample phase of some pairs; None means all of them."""
        chosen = handle.batch.pairs if pairs is None else [handle.batch.pairs[index] for index in pairs]
        work = partial(self._sample, handle, pairs, variant=self._variant(chosen), masks=masks)
        return self._device.submit(work)

    def forget_device_rows(self) -> None:
        """After a failed step the device's row vectors are unknown."""
        self._staging.forget_rows()

    def _variant(self, pairs: list[SamplePair]) -> SamplerVariant:
        key = tuple((pair.slot, pair.generation) for pair in pairs)
        if self._variant_of is None or self._variant_of[0] != key:
            self._variant_of = (key, SamplerVariant.of(pair.sequence.params for pair in pairs))
        return self._variant_of[1]

    # -- on the device ----------------------------------------------------------------------------

    def _forward(self, batch: ScheduledBatch, entry: StagingEntry, times: _DeviceTimes) -> None:
        """Uploads, block copies, model. Leaves logits of the sampled rows and the slots' new lengths."""
        times.start = time.perf_counter()
        buffers = self.buffers
        upload(entry, buffers)
        if entry.num_copies:
            copies = entry.copies[:, : entry.num_copies].to(buffers.rows.device, non_blocking=True)
            self.kv_cache.copy_blocks(copies[0], copies[1])
        bucket = AttentionBucket(
            num_tokens=batch.num_tokens, num_rows=len(batch.rows), num_decode_rows=batch.num_decode_rows
        )
        inputs, input_ids = self._step_inputs(bucket)
        metadata = self._backend.plan(inputs, bucket)
        self._backend.begin_step(metadata)
        hidden = self.model.forward(  # [num_tokens, hidden_size]
            input_ids, inputs.positions, layer_caches=self.kv_cache.layers, metadata=metadata
        )
        buffers.num_computed_tokens[inputs.row_slots] = inputs.context_lens
        num_pairs = len(batch.pairs)
        if num_pairs:
            last_tokens = inputs.query_starts[1:] - 1  # [num_rows] int64
            sampled_rows = last_tokens[buffers.pair_rows(num_pairs)]
            buffers.logits[:num_pairs] = self.model.compute_logits(hidden[sampled_rows])
        times.end = time.perf_counter()

    def _step_inputs(self, bucket: AttentionBucket) -> tuple[AttentionInputs, torch.Tensor]:
        """Everything a step's rows imply, gathered on the device from the slot tables."""
        buffers, device = self.buffers, self.buffers.rows.device
        row_slots = buffers.row_slots(bucket.num_rows)  # [num_rows] int64
        query_lens = buffers.row_lens(bucket.num_rows)  # [num_rows] int64
        num_computed = buffers.num_computed_tokens[row_slots]  # [num_rows] int64
        query_starts = torch.zeros(bucket.num_rows + 1, dtype=torch.int64, device=device)
        torch.cumsum(query_lens, 0, out=query_starts[1:])
        token_rows = torch.repeat_interleave(query_lens, output_size=bucket.num_tokens)  # [num_tokens]
        offsets = torch.arange(bucket.num_tokens, device=device) - query_starts[token_rows]
        positions = num_computed[token_rows] + offsets  # [num_tokens] int64
        token_slots = row_slots[token_rows]  # [num_tokens] int64
        blocks = buffers.block_tables[token_slots, positions // self._block_size]
        inputs = AttentionInputs(
            row_slots=row_slots,
            query_lens=query_lens,
            context_lens=num_computed + query_lens,
            query_starts=query_starts,
            positions=positions,
            slot_mapping=blocks.long() * self._block_size + positions % self._block_size,
            block_tables=buffers.block_tables,
        )
        return inputs, buffers.token_table[token_slots, positions].long()

    def _sample(
        self,
        handle: StepHandle,
        pairs: list[int] | None,
        *,
        variant: SamplerVariant,
        masks: torch.Tensor | None,
    ) -> None:
        """Sample pairs from the persistent logits; the tokens go to the slot tables and the ring."""
        buffers, num_pairs = self.buffers, len(handle.batch.pairs)
        if handle._events[0].error is not None or num_pairs == 0:
            return
        logits, slots = buffers.logits[:num_pairs], buffers.pair_slots(num_pairs)
        if pairs is not None:
            logits, slots = logits[pairs], slots[pairs]
        sampled = sample(
            logits,
            slots=slots,
            tables=buffers.sampling,
            variant=variant,
            token_table=buffers.token_table,
            lengths=buffers.num_computed_tokens,
            mask=masks,
        )
        positions = buffers.num_computed_tokens[slots]
        buffers.token_table[slots, positions] = sampled.token_ids.int()
        download(handle._entry, pairs, sampled)
        handle.times.end = time.perf_counter()


def _token_logprob(entry: StagingEntry, line: int, pair: SamplePair) -> TokenLogprob | None:
    count = pair.sequence.params.logprobs
    if count is None:
        return None
    top_ids = entry.top_ids[line, :count].tolist()
    top_logprobs = entry.top_logprobs[line, :count].tolist()
    return TokenLogprob(
        int(entry.token_ids[line]),
        float(entry.logprobs[line]),
        tuple(zip(top_ids, top_logprobs, strict=True)),
    )
