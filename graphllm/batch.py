"""What the scheduler tells the runner to do in one step, and what comes back.

Pure Python values: no tensors, no device. The scheduler and the runner meet only here.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum, auto

from graphllm.outputs import PromptScores, TokenLogprob
from graphllm.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SlotInstall:
    """Build a slot's device rows from the host's truth, before the step's forward.

    The token row, the block table and the sampling parameters are taken from `sequence` at launch,
    and `num_computed_tokens` is the number of positions whose KV the step will find. adapter_place: where
    on the device the sequence's adapter lies, -1 for the base model alone.
    """

    sequence: Sequence
    slot: int
    num_computed_tokens: int
    adapter_place: int = -1


@dataclass(frozen=True, slots=True)
class BlockAppend:
    """New entries of one slot's block tables: `blocks` go to columns `start` onwards.

    In each column there is one for each group of layers. Those of the first column may take the place of
    older entries, whose blocks were copied because others hold them too.
    """

    slot: int
    start: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SamplePair:
    """The logits of a row feed one slot; `generation` dates the slot's owner.

    held: the host decides which tokens may come next, so it is sampled apart from the forward, by
    `StepHandle.sample`, when every token before is known.
    """

    row: int
    sequence: Sequence
    slot: int
    generation: int
    held: bool = False


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """`num_tokens` tokens of one sequence, from the slot's device length onwards."""

    sequence: Sequence
    slot: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ScoredSpan:
    """Tokens of a prompt whose logprobs a step reports: `num_tokens`, the first of them at `position`.

    The step computes the tokens one before each, which are those of a row from its `offset` on.
    """

    row: int
    sequence: Sequence
    offset: int
    num_tokens: int
    position: int


class TransferDirection(Enum):
    """OUT: from the device to the host. IN: from the host to the device."""

    OUT = auto()
    IN = auto()


@dataclass(frozen=True, slots=True)
class BlockTransfer:
    """Copy whole KV blocks between the device and the host, beside the steps.

    `blocks` are (source, destination): for OUT (device block, host block), for IN (host block, device
    block). An OUT copy waits on the device for every step launched so far. No step waits for a
    transfer: the scheduler uses its blocks again only when it is told that the transfer has ended.
    """

    transfer_id: int
    direction: TransferDirection
    blocks: tuple[tuple[int, int], ...]


@dataclass(slots=True)
class ScheduledBatch:
    """One step. Decode rows (one token each) come before prefill rows.

    Order on the device: slot installs, block appends, block copies, forward, sample. `copies` are
    (source block, destination block), independent of each other. `pairs` lists what is sampled; a row
    in the middle of its prefill has none, the last row of a prompt has one for each sequence of its group.
    `spans` lists what of prompts is scored, behind all that. `pools`: some row is of a pooling request.
    `uses_adapters`: some row's sequence has one.
    """

    step_id: int
    rows: list[ScheduledRow] = field(default_factory=list)
    num_decode_rows: int = 0
    pairs: list[SamplePair] = field(default_factory=list)
    installs: list[SlotInstall] = field(default_factory=list)
    block_appends: list[BlockAppend] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    spans: list[ScoredSpan] = field(default_factory=list)
    pools: bool = False
    uses_adapters: bool = False

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)

    @property
    def has_held_pairs(self) -> bool:
        """Whether the step's time has the host's in it: it is sampled when masks have been made."""
        return any(pair.held for pair in self.pairs)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step sampled, aligned with its batch's `pairs`.

    `logprobs[i]` is None for pairs that asked for none. scores: aligned with the batch's `spans`. pooled: the
    results of pooling requests, by the index of the pair that ends them, [output_size] float32.
    """

    step_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprob | None]
    scores: list[PromptScores] = field(default_factory=list)
    pooled: dict[int, array[float]] = field(default_factory=dict)
