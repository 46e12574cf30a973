"""What the device does in one step, from slot tables to sampled tokens.

Owns the order of the device's operations. They depend on a `StepShape` and on what lies in the persistent
buffers, never on numbers of the step, so that the same program runs kernel by kernel, inside a capture and
on a CPU. Uploads before it and copies of results after it are the runner's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from graphllm.arena import Arena
from graphllm.attention.backend import AttentionBackend, AttentionBucket, AttentionInputs, GroupInputs
from graphllm.cache.kv_cache import KVCache
from graphllm.kernels.lora_tokens import lora_tokens
from graphllm.kernels.sampled_rows import SampledRows
from graphllm.kernels.step_inputs import step_inputs
from graphllm.kernels.triton_support import runs_triton
from graphllm.layers.lora import TokenAdapters
from graphllm.models.served import ServedModel
from graphllm.runner.device_sampler import sample_by_reference, sample_on_device
from graphllm.runner.sampler import SamplerKind, SamplerVariant
from graphllm.runner.step_buffers import StepBuffers
from graphllm.runner.step_reports import score_lines
from graphllm.runner.text_pooling import DeviceLines, TextPooling


@dataclass(frozen=True, slots=True)
class StepShape:
    """The sizes of a step's tensors: all that a captured graph fixes."""

    bucket: AttentionBucket
    num_pairs: int


class StepProgram:
    """One model's step over one set of persistent buffers.

    adapters: what the hooks of the model's layers read, where adapters can be served.
    """

    def __init__(
        self,
        model: ServedModel,
        *,
        backend: AttentionBackend,
        buffers: StepBuffers,
        kv_cache: KVCache,
        pooling: TextPooling,
        arena: Arena,
        adapters: TokenAdapters | None = None,
    ) -> None:
        self.buffers = buffers
        self.adapters = adapters
        self.arena = arena
        self._model = model
        self._pooling = pooling
        self._backend = backend
        self._kv_cache = kv_cache

    def forward_in_slices(self, shape: StepShape, *, with_adapters: bool = False) -> Iterator[None]:
        """The model; yields after each layer. Leaves the sampled rows' logits and the slots' new lengths.

        with_adapters: some tokens may have one; else nothing looks.
        """
        buffers, bucket = self.buffers, shape.bucket
        inputs = buffers.step_inputs(
            num_tokens=bucket.num_tokens, num_rows=bucket.num_rows, num_pairs=shape.num_pairs
        )
        row_slots, query_lens = buffers.row_slots(bucket.num_rows), buffers.row_lens(bucket.num_rows)
        block_size = self._kv_cache.shape.block_size
        step_inputs(
            row_slots=row_slots,
            query_lens=query_lens,
            pair_rows=buffers.pair_rows(shape.num_pairs),
            num_computed_tokens=buffers.num_computed_tokens,
            block_tables=buffers.block_tables,
            token_table=buffers.token_table,
            block_size=block_size,
            is_decode=bucket.is_decode,
            out=inputs,
        )
        if with_adapters:
            lora_tokens(
                row_slots=row_slots,
                query_lens=query_lens,
                query_starts=inputs.query_starts,
                slot_adapters=buffers.slot_adapters,
                is_decode=bucket.is_decode,
                out=buffers.token_adapters[: bucket.num_tokens],
            )
        attention_inputs = AttentionInputs(
            row_slots=row_slots,
            query_lens=query_lens,
            context_lens=inputs.context_lens,
            query_starts=inputs.query_starts,
            positions=inputs.positions,
            groups=tuple(map(GroupInputs, inputs.slot_mapping.unbind(), buffers.block_tables.unbind())),
        )
        metadata = self._backend.plan(attention_inputs, bucket)
        self._backend.begin_step(metadata)
        slices = self._model.forward_in_slices(
            inputs.token_ids,
            inputs.positions,
            layer_caches=self._kv_cache.layers,
            metadata=metadata,
            arena=self.arena,
            sampled_tokens=inputs.sampled_tokens,
            logits=buffers.logits[: shape.num_pairs],
        )
        yield from slices if self.adapters is None else _in_play(slices, self.adapters, with_adapters)
        buffers.num_computed_tokens.index_copy_(0, row_slots, inputs.context_lens)

    def forward(self, shape: StepShape, *, with_adapters: bool = False) -> None:
        """See `forward_in_slices`."""
        for _ in self.forward_in_slices(shape, with_adapters=with_adapters):
            pass

    def sample(self, num_pairs: int, kind: SamplerKind) -> None:
        """Sample the step's first `num_pairs` pairs from the logits, as a captured step does."""
        self._sample_on_device(self.buffers.pair_slots(num_pairs), kind, lines=None, masks=None)

    def sample_subset(self, num_pairs: int, kind: SamplerKind, *, masked: bool) -> None:
        """The same for the pairs that `buffers.subset` names, with the masks that lie in `buffers.masks`."""
        lines, slots = self.buffers.subset[:, :num_pairs].unbind()
        self._sample_on_device(
            slots, kind, lines=lines, masks=self.buffers.masks[:num_pairs] if masked else None
        )

    def sample_by_reference(self, num_pairs: int, variant: SamplerVariant) -> None:
        """`sample` where no kernels run, for exactly the operations that the pairs need."""
        self._sample_by_reference(self.buffers.pair_slots(num_pairs), variant, lines=None, masks=None)

    def sample_subset_by_reference(self, num_pairs: int, variant: SamplerVariant, *, masked: bool) -> None:
        """`sample_subset` where no kernels run."""
        lines, slots = self.buffers.subset[:, :num_pairs].unbind()
        masks = self.buffers.masks[:num_pairs] if masked else None
        self._sample_by_reference(slots, variant, lines=lines, masks=masks)

    def score(self, num_scored: int, *, num_tokens: int, num_top: int) -> None:
        """Score the prompt tokens that the first `num_scored` lines of `buffers.scores` name.

        The step has `num_tokens` tokens, padding included, and was the last to run. Its pairs must have been
        sampled: their logits are lost. num_top: alternatives wanted, at most 20.
        """
        buffers, num_lines = self.buffers, len(self.buffers.logits)
        for first in range(0, num_scored, num_lines):
            # Kernels run whole slices, so that nothing is compiled or chosen anew for a size that comes up.
            end = first + num_lines if self.runs_kernels else min(first + num_lines, num_scored)
            scores, logits = buffers.scores.part(slice(first, end)), buffers.logits[: end - first]
            hidden = self._model.final_hidden(scores.tokens, num_tokens=num_tokens, arena=self.arena)
            self._model.project(hidden, arena=self.arena, out=logits)
            rows = SampledRows(  # as many as there are targets; no slot is looked at
                slots=scores.targets,
                lines=None,
                floats=buffers.sampling.floats,
                ints=buffers.sampling.ints,
                lengths=buffers.num_computed_tokens,
            )
            score_lines(logits, scores, rows=rows, arena=self.arena, num_top=num_top)

    def pool(self, lines: DeviceLines, *, num_tokens: int) -> torch.Tensor:
        """The results of a step of `num_tokens`, the last to run: [num_lines, output_size] float32."""
        return self._pooling.pool(self._model, lines, num_step_tokens=num_tokens, arena=self.arena)

    def pool_largest(self, *, num_tokens: int, num_lines: int) -> None:
        """See `TextPooling.pool_largest`."""
        self._pooling.pool_largest(
            self._model, num_step_tokens=num_tokens, num_lines=num_lines, arena=self.arena
        )

    @property
    def adapter_kinds(self) -> tuple[bool, ...]:
        """The values that `with_adapters` can have."""
        return (False,) if self.adapters is None else (False, True)

    @property
    def runs_kernels(self) -> bool:
        """Whether steps are done by kernels, which read nothing on the host, or by their references."""
        return runs_triton(self.buffers.logits)

    def _sample_on_device(
        self,
        slots: torch.Tensor,
        kind: SamplerKind,
        *,
        lines: torch.Tensor | None,
        masks: torch.Tensor | None,
    ) -> None:
        buffers = self.buffers
        sample_on_device(
            buffers.logits,
            slots=slots,
            tables=buffers.sampling,
            kind=kind,
            token_table=buffers.token_table,
            lengths=buffers.num_computed_tokens,
            results=buffers.results,
            arena=self.arena,
            masks=masks,
            lines=lines,
        )

    def _sample_by_reference(
        self,
        slots: torch.Tensor,
        variant: SamplerVariant,
        *,
        lines: torch.Tensor | None,
        masks: torch.Tensor | None,
    ) -> None:
        buffers = self.buffers
        sample_by_reference(
            buffers.logits,
            slots=slots,
            tables=buffers.sampling,
            variant=variant,
            token_table=buffers.token_table,
            lengths=buffers.num_computed_tokens,
            results=buffers.results,
            masks=masks,
            lines=lines,
        )


def _in_play(slices: Iterator[None], adapters: TokenAdapters, with_adapters: bool) -> Iterator[None]:
    """The same slices, in each of which the hooks know what step they are in: others may come between."""
    while True:
        adapters.in_play = with_adapters
        has_more = next(slices, _END) is not _END
        adapters.in_play = False
        if not has_more:
            return
        yield


_END = object()
