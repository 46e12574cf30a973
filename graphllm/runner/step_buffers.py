"""The persistent device tables of a step, and the host memory that feeds and drains them.

`StepBuffers` is the only owner of persistent device addresses: the slot tables (token history,
lengths, block tables, sampling parameters), the vectors that name a step's rows, and the logits.
`StagingRing` holds what the host hands to a step and what the step hands back. An entry is used
again only after its step's event, because the device reads it when the step runs, not at launch.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch

from graphllm.batch import ScheduledBatch
from graphllm.runner.device import Device
from graphllm.runner.memory_plan import MemoryPlan
from graphllm.runner.sampler import SampledTokens, SamplingRow, SamplingTables, pack_sampling_row
from graphllm.sampling_params import MAX_LOGPROBS

_ROW_SLOTS, _ROW_LENS, _PAIR_ROWS, _PAIR_SLOTS = range(4)


class StepBuffers:
    """Device tables with a row for each slot, and a step's row vectors.

    token_table: [num_slots, max_model_len + 1] int32, prompt and output of the slot's sequence.
    num_computed_tokens: [num_slots] int64, positions whose KV is computed; also the position that
        the next sampled token takes once a step's forward is done.
    block_tables: [num_slots, max_blocks] int32.
    rows: [4, max_num_seqs] int64: slots and lengths of the step's rows, rows and slots of its pairs;
        rows_version says which upload they are from.
    logits: [max_num_seqs, vocab_size] float32, a line for each sampled pair.
    """

    def __init__(self, plan: MemoryPlan, *, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self.token_table = torch.zeros(
            plan.num_slots, plan.max_model_len + 1, dtype=torch.int32, device=device
        )
        self.num_computed_tokens = torch.zeros(plan.num_slots, dtype=torch.int64, device=device)
        self.block_tables = torch.zeros(
            plan.num_slots, plan.max_blocks_per_sequence, dtype=torch.int32, device=device
        )
        self.sampling = SamplingTables.allocate(plan.num_slots, device=device)
        self.rows = torch.zeros(4, max_num_seqs, dtype=torch.int64, device=device)
        self.rows_version = 0
        self.logits = torch.zeros(max_num_seqs, vocab_size, dtype=torch.float32, device=device)

    def row_slots(self, num_rows: int) -> torch.Tensor:
        return self.rows[_ROW_SLOTS, :num_rows]

    def row_lens(self, num_rows: int) -> torch.Tensor:
        return self.rows[_ROW_LENS, :num_rows]

    def pair_rows(self, num_pairs: int) -> torch.Tensor:
        return self.rows[_PAIR_ROWS, :num_pairs]

    def pair_slots(self, num_pairs: int) -> torch.Tensor:
        return self.rows[_PAIR_SLOTS, :num_pairs]


@dataclass(slots=True)
class _StagedInstall:
    """One slot's new rows: its tokens and blocks are slices of the entry's flat memory."""

    slot: int
    tokens: slice
    blocks: slice
    num_computed_tokens: int
    sampling: SamplingRow


@dataclass(slots=True)
class StagingEntry:
    """One step's host memory: inputs that the device reads, results that it writes.

    rows: as StepBuffers.rows. tokens, blocks: flat int32, grown when a step needs more.
    block_index: [capacity] int64 flat positions in block_tables for the blocks of `appends`.
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    blocks: torch.Tensor
    block_index: torch.Tensor
    copies: torch.Tensor
    token_ids: torch.Tensor
    logprobs: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor
    installs: list[_StagedInstall] = field(default_factory=list)
    appends: slice = field(default_factory=lambda: slice(0, 0))
    num_copies: int = 0
    rows_version: int = 0
    upload_rows: bool = True
    in_use: bool = False


class StagingRing:
    """`depth` entries, handed out in turn; one more than the steps that can be in flight."""

    def __init__(self, plan: MemoryPlan, *, max_num_seqs: int, device: Device, depth: int = 3) -> None:
        self._device = device
        self._max_blocks = plan.max_blocks_per_sequence
        self._entries = [self._new_entry(plan, max_num_seqs) for _ in range(depth)]
        self._next = 0
        self._uploaded_rows: list[tuple[int, ...]] | None = None
        self._rows_version = 0

    def _new_entry(self, plan: MemoryPlan, max_num_seqs: int) -> StagingEntry:
        host = self._device.empty_host
        return StagingEntry(
            rows=host(4, max_num_seqs, dtype=torch.int64),
            tokens=host(plan.max_num_batched_tokens, dtype=torch.int32),
            blocks=host(plan.max_num_batched_tokens, dtype=torch.int32),
            block_index=host(plan.max_num_batched_tokens, dtype=torch.int64),
            copies=host(2, max_num_seqs, dtype=torch.int64),
            token_ids=host(max_num_seqs, dtype=torch.int64),
            logprobs=host(max_num_seqs, dtype=torch.float32),
            top_ids=host(max_num_seqs, MAX_LOGPROBS, dtype=torch.int64),
            top_logprobs=host(max_num_seqs, MAX_LOGPROBS, dtype=torch.float32),
        )

    def stage(self, batch: ScheduledBatch, *, eos_token_ids: frozenset[int]) -> StagingEntry:
        """Write everything the device needs to know of `batch` into the next entry."""
        entry = self._entries[self._next]
        assert not entry.in_use, "more steps in flight than staging entries"
        self._next = (self._next + 1) % len(self._entries)
        entry.in_use = True
        self._stage_rows(entry, batch)
        self._stage_blocks_and_tokens(entry, batch, eos_token_ids=eos_token_ids)
        entry.num_copies = len(batch.copies)
        if batch.copies:
            entry.copies.numpy()[:, : entry.num_copies] = list(zip(*batch.copies, strict=True))
        return entry

    def forget_rows(self) -> None:
        """The device's row vectors are no longer known (a step failed): upload them next time."""
        self._uploaded_rows = None

    def _stage_rows(self, entry: StagingEntry, batch: ScheduledBatch) -> None:
        rows = [
            tuple(row.slot for row in batch.rows),
            tuple(row.num_tokens for row in batch.rows),
            tuple(pair.row for pair in batch.pairs),
            tuple(pair.slot for pair in batch.pairs),
        ]
        # A step of unchanged membership finds its row vectors on the device already.
        entry.upload_rows = rows != self._uploaded_rows
        if entry.upload_rows:
            self._uploaded_rows = rows
            self._rows_version += 1
            target = entry.rows.numpy()
            for line, values in enumerate(rows):
                target[line, : len(values)] = values
        entry.rows_version = self._rows_version

    def _stage_blocks_and_tokens(
        self, entry: StagingEntry, batch: ScheduledBatch, *, eos_token_ids: frozenset[int]
    ) -> None:
        tokens: list[int] = []
        blocks: list[int] = []
        entry.installs = []
        for install in batch.installs:
            sequence = install.sequence
            first_token, first_block = len(tokens), len(blocks)
            tokens.extend(sequence.token_ids)
            blocks.extend(sequence.block_table)
            row = pack_sampling_row(
                sequence.params,
                seed=sequence.group.seed,
                sibling=sequence.index,
                num_prompt_tokens=sequence.num_prompt_tokens,
                eos_token_ids=() if sequence.params.ignore_eos else eos_token_ids,
            )
            entry.installs.append(
                _StagedInstall(
                    slot=install.slot,
                    tokens=slice(first_token, len(tokens)),
                    blocks=slice(first_block, len(blocks)),
                    num_computed_tokens=install.num_computed_tokens,
                    sampling=row,
                )
            )
        first_append = len(blocks)
        index: list[int] = [0] * first_append
        for append in batch.block_appends:
            start = append.slot * self._max_blocks + append.start
            index.extend(range(start, start + len(append.blocks)))
            blocks.extend(append.blocks)
        entry.appends = slice(first_append, len(blocks))
        entry.tokens = self._write(entry.tokens, tokens)
        entry.blocks = self._write(entry.blocks, blocks)
        entry.block_index = self._write(entry.block_index, index)

    def _write(self, target: torch.Tensor, values: SequenceOf[int]) -> torch.Tensor:
        """`target` with `values` at its start; replaced by a larger one when they do not fit."""
        if len(values) > target.numel():
            target = self._device.empty_host(2 * len(values), dtype=target.dtype)
        if values:
            target.numpy()[: len(values)] = values
        return target


def upload(entry: StagingEntry, buffers: StepBuffers) -> None:
    """Scatter an entry into the device tables; runs on the device, in stream order."""
    for install in entry.installs:
        tokens = entry.tokens[install.tokens]
        buffers.token_table[install.slot, : tokens.numel()].copy_(tokens, non_blocking=True)
        blocks = entry.blocks[install.blocks]
        buffers.block_tables[install.slot, : blocks.numel()].copy_(blocks, non_blocking=True)
        buffers.num_computed_tokens[install.slot].fill_(install.num_computed_tokens)
        buffers.sampling.write_row(install.slot, install.sampling)
    if entry.appends.stop > entry.appends.start:
        index = entry.block_index[entry.appends].to(buffers.block_tables.device, non_blocking=True)
        blocks = entry.blocks[entry.appends].to(buffers.block_tables.device, non_blocking=True)
        buffers.block_tables.view(-1)[index] = blocks
    if entry.upload_rows:
        buffers.rows.copy_(entry.rows, non_blocking=True)
        buffers.rows_version = entry.rows_version
    elif buffers.rows_version != entry.rows_version:
        # The step that should have uploaded them failed: these are other sequences' rows.
        raise RuntimeError("the step ahead of this one failed before its rows were uploaded")


def download(entry: StagingEntry, pairs: list[int] | None, sampled: SampledTokens) -> None:
    """Write what was sampled into the entry; runs on the device. `pairs` None means the first ones."""
    lines = slice(0, sampled.token_ids.numel()) if pairs is None else pairs
    entry.token_ids[lines] = sampled.token_ids.to(entry.token_ids.device, non_blocking=True)
    if sampled.logprobs is None:
        return
    entry.logprobs[lines] = sampled.logprobs
    if sampled.top_ids is not None and sampled.top_logprobs is not None:
        width = sampled.top_ids.shape[1]
        entry.top_ids[lines, :width] = sampled.top_ids
        entry.top_logprobs[lines, :width] = sampled.top_logprobs
