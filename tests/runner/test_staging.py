"""What a step uploads of new slots: every row right, and no more copied on the host than there is."""

from __future__ import annotations

import torch

from graphllm.attention.backend import AttentionBucket
from graphllm.batch import SamplePair, ScheduledBatch, ScheduledRow, SlotInstall
from graphllm.models.pooling import PoolingConfig
from graphllm.runner.device import InlineDevice
from graphllm.runner.memory_plan import StepLimits
from graphllm.runner.staging import StagingRing, upload
from graphllm.runner.step_buffers import StepBuffers
from graphllm.runner.step_program import StepShape
from graphllm.sampling_params import SamplingParams
from graphllm.sequence import Sequence, SequenceGroup

LIMITS = StepLimits(max_model_len=64, max_num_batched_tokens=32, num_slots=9, block_size=16)


def group_of(prompt: list[int], n: int) -> list[Sequence]:
    group = SequenceGroup("r", prompt, params=SamplingParams(n=n), seed=1, max_total_tokens=64)
    for slot, sequence in enumerate(group.sequences):
        sequence.slot = slot
    return group.sequences


def install(*sequences: Sequence) -> ScheduledBatch:
    batch = ScheduledBatch(1)
    for sequence in sequences:
        assert sequence.slot is not None
        batch.installs.append(SlotInstall(sequence, sequence.slot, len(sequence.token_ids)))
        batch.pairs.append(SamplePair(0, sequence, sequence.slot, sequence.slot + 1))
    batch.rows.append(ScheduledRow(sequences[0], sequences[0].slot or 0, 1))
    return batch


def test_siblings_share_one_copy_of_their_prompt_and_each_slot_has_its_own_tokens() -> None:
    siblings = group_of(list(range(100, 140)), n=6)
    siblings[4].token_ids += [7, 8]  # it has run before, as has the last
    siblings[5].token_ids += [9]
    others = group_of(list(range(40)), n=2)
    for sequence, slot in zip(others, (6, 7), strict=True):
        sequence.slot = slot
    ring = StagingRing(
        LIMITS,
        max_num_seqs=8,
        padding_slot=8,
        pooling=PoolingConfig(purpose="generate", method="last", hidden_size=4),
        device=InlineDevice(),
    )
    buffers = StepBuffers(LIMITS, max_num_seqs=8, vocab_size=300, device=torch.device("cpu"))
    batch = install(*siblings, *others)
    entry = ring.stage(batch, shape=StepShape(AttentionBucket(1, 1, 1), 8), eos_token_ids=frozenset())
    assert entry.tokens.num_rows == 40 + 42 + 41 + 40, "one copy for four siblings, one for two others"
    upload(entry, buffers)
    for sequence in (*siblings, *others):
        row = buffers.token_table[sequence.slot, : len(sequence.token_ids)]
        assert row.tolist() == sequence.token_ids
