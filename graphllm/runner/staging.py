"""Host memory between the scheduler's batches and the device: what a step uploads and brings back.

Owns the ring of entries and the copies in both directions. An entry is used again only after its step's
event, because the device reads it when the step runs, not at launch; on a card all of it is pinned, so
that no copy waits for another.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from graphllm.batch import ScheduledBatch
from graphllm.kernels.sampled_rows import NUM_FLOATS, NUM_INTS
from graphllm.models.pooling import PoolingConfig
from graphllm.runner.device import Device
from graphllm.runner.device_sampler import SampleResults
from graphllm.runner.memory_plan import StepLimits, num_logit_lines
from graphllm.runner.sampler import MAX_STOP_IDS, SamplingRow, pack_sampling_row
from graphllm.runner.step_buffers import NUM_ROW_VECTORS, StepBuffers
from graphllm.runner.step_program import StepShape
from graphllm.runner.step_reports import ScoreLines, stage_spans
from graphllm.runner.text_pooling import DeviceLines, PooledLine, pooled_lines
from graphllm.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS
from graphllm.sequence import SequenceGroup


class _HostTable:
    """Rows of host memory that grow: what is staged lies in the first `num_rows`."""

    __slots__ = ("_device", "memory", "num_rows")

    def __init__(self, device: Device, num_rows: int, *width: int, dtype: torch.dtype) -> None:
        self._device = device
        self.memory = device.empty_host(num_rows, *width, dtype=dtype)
        self.num_rows = 0

    def write(self, rows: SequenceOf[Any] | npt.NDArray[Any]) -> None:
        """Stage these rows (numbers, or tuples of numbers that may be shorter than a row)."""
        self.num_rows = len(rows)
        if self.num_rows > len(self.memory):
            width, dtype = self.memory.shape[1:], self.memory.dtype
            self.memory = self._device.empty_host(2 * self.num_rows, *width, dtype=dtype)
        if self.num_rows == 0:
            return
        target = self.memory.numpy()
        if isinstance(rows[0], tuple):
            for index, row in enumerate(rows):
                target[index, : len(row)] = row
        else:
            target[: self.num_rows] = rows

    def to(self, device: torch.device) -> torch.Tensor:
        """The staged rows on the device, in stream order."""
        return self.memory[: self.num_rows].to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class _StagedTokens:
    """One new slot's token row, a slice of the entry's flat memory, which siblings may share."""

    slot: int
    tokens: slice


@dataclass(frozen=True, slots=True)
class _HostLines:
    """The columns of `DeviceLines`, and where results come back: [max_num_seqs, output_size] float32."""

    tokens: _HostTable
    num_tokens: _HostTable
    slots: _HostTable
    is_continued: _HostTable
    divisors: _HostTable
    results: torch.Tensor

    def write(self, lines: list[PooledLine]) -> None:
        spans = [np.arange(line.first_token, line.first_token + line.num_tokens) for line in lines]
        self.tokens.write(np.concatenate(spans) if spans else ())
        self.num_tokens.write([line.num_tokens for line in lines])
        self.slots.write([line.slot for line in lines])
        self.is_continued.write([line.is_continued for line in lines])
        self.divisors.write([line.divisor for line in lines])

    def to(self, device: torch.device) -> DeviceLines:
        """The staged columns on the device, in stream order."""
        return DeviceLines(
            self.tokens.to(device),
            self.num_tokens.to(device),
            self.slots.to(device),
            self.is_continued.to(device),
            self.divisors.to(device),
        )


@dataclass(slots=True)
class StagingEntry:
    """One step's host memory: inputs that the device reads, results that it writes.

    rows: as StepBuffers.rows. tokens: flat int32. blocks int32 and block_index int64: new entries of the
    block tables and their flat positions there. copies: [n, 2] int64, from and to. slots, lengths, adapters:
    the new slots, how many of their tokens are computed, where their adapters lie. floats, ints, bias_*,
    stop_*: sampling parameters of the new slots, those with biases and stop tokens apart because few have
    any. subset: [2 phases, 2, max_num_seqs] int64; masks: [max_num_seqs, words] int32, once it was needed.
    The step loop writes the masks of held pairs itself. num_scored counts the lines of prompt tokens to
    score, `scores`; pooled_lines says what of the step is pooled, `pooled` what the device reads and writes
    of it.
    """

    rows: torch.Tensor
    subset: torch.Tensor
    results: SampleResults
    scores: ScoreLines
    pooled: _HostLines
    tokens: _HostTable
    blocks: _HostTable
    block_index: _HostTable
    copies: _HostTable
    slots: _HostTable
    lengths: _HostTable
    adapters: _HostTable
    floats: _HostTable
    ints: _HostTable
    bias_slots: _HostTable
    bias_ids: _HostTable
    bias_values: _HostTable
    stop_slots: _HostTable
    stop_ids: _HostTable
    masks: torch.Tensor | None = None
    installs: list[_StagedTokens] = field(default_factory=list)
    num_scored: int = 0
    pooled_lines: list[PooledLine] = field(default_factory=list)
    rows_version: int = 0
    upload_rows: bool = True
    in_use: bool = False


class StagingRing:
    """`depth` entries, handed out in turn; one more than the steps that can be in flight."""

    def __init__(
        self,
        limits: StepLimits,
        *,
        max_num_seqs: int,
        padding_slot: int,
        pooling: PoolingConfig,
        device: Device,
        num_groups: int = 1,
        depth: int = 3,
    ) -> None:
        self._device = device
        self._table_width = limits.table_width
        self._num_groups = num_groups
        self._tables_size = (limits.num_slots + 1) * limits.table_width  # entries of a group's tables
        self._padding_slot = padding_slot
        self._max_num_seqs = max_num_seqs
        self._pooling = pooling
        self._num_logit_lines = num_logit_lines(limits, max_num_seqs)
        self._entries = [self._new_entry(limits) for _ in range(depth)]
        self._next = 0
        self._uploaded_rows: tuple[StepShape, list[tuple[int, ...]]] | None = None
        self._rows_version = 0

    def _new_entry(self, limits: StepLimits) -> StagingEntry:
        host, num_lines = self._device.empty_host, self._max_num_seqs
        num_scored = -(-limits.max_num_batched_tokens // self._num_logit_lines) * self._num_logit_lines

        def table(num_rows: int, *width: int, dtype: torch.dtype) -> _HostTable:
            return _HostTable(self._device, num_rows, *width, dtype=dtype)

        return StagingEntry(
            rows=host(NUM_ROW_VECTORS, num_lines, dtype=torch.int64),
            subset=host(2, 2, num_lines, dtype=torch.int64),
            results=SampleResults(
                token_ids=host(num_lines, dtype=torch.int64),
                logprobs=host(num_lines, dtype=torch.float32),
                top_ids=host(num_lines, MAX_LOGPROBS, dtype=torch.int64),
                top_logprobs=host(num_lines, MAX_LOGPROBS, dtype=torch.float32),
            ),
            scores=ScoreLines.allocate(num_scored, host),
            pooled=_HostLines(
                tokens=table(limits.max_num_batched_tokens, dtype=torch.int64),
                num_tokens=table(num_lines, dtype=torch.int64),
                slots=table(num_lines, dtype=torch.int64),
                is_continued=table(num_lines, dtype=torch.bool),
                divisors=table(num_lines, dtype=torch.float32),
                results=host(num_lines, self._pooling.output_size, dtype=torch.float32),
            ),
            tokens=table(limits.max_num_batched_tokens, dtype=torch.int32),
            blocks=table(limits.max_num_batched_tokens, dtype=torch.int32),
            block_index=table(limits.max_num_batched_tokens, dtype=torch.int64),
            copies=table(num_lines, 2, dtype=torch.int64),
            slots=table(num_lines, dtype=torch.int64),
            lengths=table(num_lines, dtype=torch.int64),
            adapters=table(num_lines, dtype=torch.int32),
            floats=table(num_lines, NUM_FLOATS, dtype=torch.float32),
            ints=table(num_lines, NUM_INTS, dtype=torch.int64),
            bias_slots=table(1, dtype=torch.int64),
            bias_ids=table(1, MAX_LOGIT_BIAS, dtype=torch.int32),
            bias_values=table(1, MAX_LOGIT_BIAS, dtype=torch.float32),
            stop_slots=table(1, dtype=torch.int64),
            stop_ids=table(1, MAX_STOP_IDS, dtype=torch.int32),
        )

    def stage(
        self, batch: ScheduledBatch, *, shape: StepShape, eos_token_ids: frozenset[int]
    ) -> StagingEntry:
        """Write everything the device needs to know of `batch`, run at `shape`, into the next entry."""
        entry = self._entries[self._next]
        assert not entry.in_use, "more steps in flight than staging entries"
        self._next = (self._next + 1) % len(self._entries)
        entry.in_use = True
        self._stage_rows(entry, batch, shape)
        self._stage_slots(entry, batch, eos_token_ids=eos_token_ids)
        entry.copies.write(batch.copies)
        entry.pooled_lines = pooled_lines(batch, self._pooling.method)
        entry.pooled.write(entry.pooled_lines)
        entry.num_scored = stage_spans(batch, entry.scores, num_slice_lines=self._num_logit_lines)
        return entry

    def stage_subset(
        self,
        entry: StagingEntry,
        phase: int,
        *,
        lines: list[int],
        slots: list[int],
        num_padded: int,
        masked: bool,
    ) -> None:
        """Write which of a step's pairs are sampled by themselves; a step has two such phases at most.

        masked: the first len(lines) rows of the entry's masks are theirs. Padding repeats the first pair, its
        slot and mask too, because results are written by line: whichever comes last then writes the same.
        """
        num_padding = num_padded - len(lines)
        target = entry.subset[phase].numpy()
        target[0, :num_padded] = lines + lines[:1] * num_padding
        target[1, :num_padded] = slots + slots[:1] * num_padding
        if masked:
            assert entry.masks is not None, "masks were written"
            entry.masks[len(lines) : num_padded] = entry.masks[0]

    def masks_of(self, entry: StagingEntry, *, num_words: int) -> torch.Tensor:
        """The entry's masks, [max_num_seqs, num_words] int32, allocated when they are first needed."""
        if entry.masks is None:
            entry.masks = self._device.empty_host(self._max_num_seqs, num_words, dtype=torch.int32)
        return entry.masks

    def forget_rows(self) -> None:
        """The device's row vectors are no longer known (a step failed): upload them next time."""
        self._uploaded_rows = None

    def _stage_rows(self, entry: StagingEntry, batch: ScheduledBatch, shape: StepShape) -> None:
        num_padding_rows = shape.bucket.num_rows - len(batch.rows)
        num_padding_pairs = shape.num_pairs - len(batch.pairs)
        rows = [
            (*(row.slot for row in batch.rows), *[self._padding_slot] * num_padding_rows),
            (*(row.num_tokens for row in batch.rows), *[0] * num_padding_rows),
            (*(pair.row for pair in batch.pairs), *[0] * num_padding_pairs),
            (*(pair.slot for pair in batch.pairs), *[self._padding_slot] * num_padding_pairs),
        ]
        # A step of unchanged membership finds its row vectors on the device already.
        entry.upload_rows = (shape, rows) != self._uploaded_rows
        if entry.upload_rows:
            self._uploaded_rows = (shape, rows)
            self._rows_version += 1
            target = entry.rows.numpy()
            for line, values in enumerate(rows):
                target[line, : len(values)] = values
        entry.rows_version = self._rows_version

    def _stage_slots(
        self, entry: StagingEntry, batch: ScheduledBatch, *, eos_token_ids: frozenset[int]
    ) -> None:
        tokens: list[int] = []
        blocks: list[int] = []
        block_index: list[int] = []
        sampling: list[tuple[int, SamplingRow]] = []
        prompts: dict[SequenceGroup, slice] = {}
        entry.installs = []
        for install in batch.installs:
            sequence = install.sequence
            # Siblings start with the same tokens: a hundred copies of a long prompt would stop the loop.
            is_prompt = sequence.num_output_tokens == 0
            staged = prompts.get(sequence.group) if is_prompt else None
            if staged is None:
                staged = slice(len(tokens), len(tokens) + len(sequence.token_ids))
                tokens.extend(sequence.token_ids)
                if is_prompt:
                    prompts[sequence.group] = staged
            entry.installs.append(_StagedTokens(install.slot, staged))
            self._stage_blocks(install.slot, 0, sequence.block_table, to=(blocks, block_index))
            row = pack_sampling_row(
                sequence.params,
                seed=sequence.group.seed,
                sibling=sequence.index,
                num_prompt_tokens=sequence.num_prompt_tokens,
                eos_token_ids=() if sequence.params.ignore_eos else eos_token_ids,
                # A constraint may have to let a sequence end early, so the host applies its min_tokens.
                applies_min_tokens=sequence.constraint is None,
            )
            sampling.append((install.slot, row))
        new_slots = {install.slot for install in batch.installs}
        for append in batch.block_appends:
            if append.slot not in new_slots:  # a new slot's table is whole already
                self._stage_blocks(append.slot, append.start, append.blocks, to=(blocks, block_index))
        entry.tokens.write(tokens)
        entry.blocks.write(blocks)
        entry.block_index.write(block_index)
        entry.slots.write([install.slot for install in batch.installs])
        entry.lengths.write([install.num_computed_tokens for install in batch.installs])
        entry.adapters.write([install.adapter_place for install in batch.installs])
        _stage_sampling(entry, sampling)

    def _stage_blocks(
        self, slot: int, start: int, entries: SequenceOf[int], *, to: tuple[list[int], list[int]]
    ) -> None:
        """Add to `to` the entries of columns from `start` on, and where they go in the flat device tables."""
        blocks, block_index = to
        for group in range(self._num_groups):
            of_group = entries[group :: self._num_groups]
            first = group * self._tables_size + slot * self._table_width + start
            blocks.extend(of_group)
            block_index.extend(range(first, first + len(of_group)))


def _stage_sampling(entry: StagingEntry, rows: list[tuple[int, SamplingRow]]) -> None:
    entry.floats.write([row.floats for _, row in rows])
    entry.ints.write([row.ints for _, row in rows])
    biased = [(slot, row) for slot, row in rows if row.bias_ids is not None and row.bias_values is not None]
    entry.bias_slots.write([slot for slot, _ in biased])
    entry.bias_ids.write([row.bias_ids for _, row in biased])
    entry.bias_values.write([row.bias_values for _, row in biased])
    stopped = [(slot, row) for slot, row in rows if row.stop_ids is not None]
    entry.stop_slots.write([slot for slot, _ in stopped])
    entry.stop_ids.write([row.stop_ids for _, row in stopped])


def upload(entry: StagingEntry, buffers: StepBuffers) -> None:
    """Scatter an entry into the device tables; runs on the device, in stream order."""
    device = buffers.rows.device
    if entry.installs:
        _upload_slots(entry, buffers)
    if entry.blocks.num_rows:
        flat_tables = buffers.block_tables.view(-1)
        flat_tables.index_copy_(0, entry.block_index.to(device), entry.blocks.to(device))
    if entry.upload_rows:
        buffers.rows.copy_(entry.rows, non_blocking=True)
        buffers.rows_version = entry.rows_version
    elif buffers.rows_version != entry.rows_version:
        # The step that should have uploaded them failed: these are other sequences' rows.
        raise RuntimeError("the step ahead of this one failed before its rows were uploaded")


def _upload_slots(entry: StagingEntry, buffers: StepBuffers) -> None:
    """New slots: their tokens, lengths and sampling parameters (their blocks go with all the others)."""
    device, sampling = buffers.rows.device, buffers.sampling
    for install in entry.installs:
        tokens = entry.tokens.memory[install.tokens]
        buffers.token_table[install.slot, : tokens.numel()].copy_(tokens, non_blocking=True)
    slots = entry.slots.to(device)
    buffers.num_computed_tokens.index_copy_(0, slots, entry.lengths.to(device))
    buffers.slot_adapters.index_copy_(0, slots, entry.adapters.to(device))
    sampling.write_rows(slots, floats=entry.floats.to(device), ints=entry.ints.to(device))
    if entry.bias_slots.num_rows:
        sampling.write_rows(
            entry.bias_slots.to(device),
            bias_ids=entry.bias_ids.to(device),
            bias_values=entry.bias_values.to(device),
        )
    if entry.stop_slots.num_rows:
        sampling.write_rows(entry.stop_slots.to(device), stop_ids=entry.stop_ids.to(device))


def upload_subset(
    entry: StagingEntry, phase: int, buffers: StepBuffers, *, num_pairs: int, masked: bool
) -> None:
    """The pairs of a sampler that stands alone, and their masks; runs on the device."""
    # Whole: a part would be strided, and no copy engine's single copy.
    buffers.subset.copy_(entry.subset[phase], non_blocking=True)
    if masked:
        assert entry.masks is not None, "masks were staged"
        buffers.masks[:num_pairs].copy_(entry.masks[:num_pairs], non_blocking=True)


def download(entry: StagingEntry, buffers: StepBuffers, *, num_pairs: int, with_logprobs: bool) -> None:
    """Copy a step's results to the host, in stream order, so that no later step can overtake the copy."""
    names = ("token_ids", "logprobs", "top_ids", "top_logprobs") if with_logprobs else ("token_ids",)
    for name in names:
        source, target = getattr(buffers.results, name), getattr(entry.results, name)
        target[:num_pairs].copy_(source[:num_pairs], non_blocking=True)
