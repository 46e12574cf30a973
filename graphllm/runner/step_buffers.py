"""The persistent device tables of a step: the only owner of addresses that outlive one.

Slot tables (token history, lengths, block tables, sampling parameters), the vectors that name a step's
rows, logits and results. A captured graph reads and writes these addresses, so none is ever replaced.
What fills and drains them is `staging.py`.
"""

from __future__ import annotations

from functools import partial

import torch

from graphllm.kernels.step_inputs import StepInputs
from graphllm.runner.device_sampler import SampleResults
from graphllm.runner.memory_plan import StepLimits, num_logit_lines
from graphllm.runner.sampler import SamplingTables
from graphllm.runner.step_reports import ScoreLines

ROW_SLOTS, ROW_LENS, PAIR_ROWS, PAIR_SLOTS = range(4)
NUM_ROW_VECTORS = 4


class StepBuffers:
    """Device tables with a row for each slot, and a step's row vectors.

    The last row of each slot table, `padding_slot`, belongs to nobody: padding rows and pairs name it.
    Its block table is all null block, its parameters greedy, and it has no tokens.

    token_table: [num_slots + 1, max_model_len + 1] int32, prompt and output of the slot's sequence.
    num_computed_tokens: [num_slots + 1] int64, positions whose KV is computed; also the position that
        the next sampled token takes once a step's forward is done.
    block_tables: [num_groups, num_slots + 1, table_width] int32, of each group of layers.
    slot_adapters: [num_slots + 1] int32, where on the device the adapter of the slot's sequence lies, or -1;
        token_adapters: [max_num_tokens] int32, the same of a step's tokens, for steps that have any.
    rows: [4, max_num_seqs] int64: slots and lengths of the step's rows, rows and slots of its pairs;
        rows_version says which upload they are from.
    subset: [2, max_num_seqs] int64: lines and slots of pairs that are sampled by themselves.
    masks: [max_num_seqs, ceil(vocab_size / 32)] int32, the grammar's, of such pairs.
    logits: [num_logit_lines, vocab_size] float32, a line for each sampled pair; when those are sampled, for a
        slice of the prompt tokens that are scored.
    results: what was sampled, a line for each pair.
    scores: which prompt tokens are scored and what is found, whole slices of lines.
    """

    def __init__(
        self,
        limits: StepLimits,
        *,
        max_num_seqs: int,
        vocab_size: int,
        device: torch.device,
        num_groups: int = 1,
    ) -> None:
        num_slots = limits.num_slots + 1
        self.padding_slot = limits.num_slots
        self.max_num_seqs = max_num_seqs
        self.token_table = torch.zeros(num_slots, limits.max_model_len + 1, dtype=torch.int32, device=device)
        self.num_computed_tokens = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.block_tables = torch.zeros(
            num_groups, num_slots, limits.table_width, dtype=torch.int32, device=device
        )
        self.slot_adapters = torch.full((num_slots,), -1, dtype=torch.int32, device=device)
        self.sampling = SamplingTables.allocate(num_slots, device=device)
        self.rows = torch.zeros(NUM_ROW_VECTORS, max_num_seqs, dtype=torch.int64, device=device)
        self.rows[[ROW_SLOTS, PAIR_SLOTS]] = self.padding_slot
        self.rows_version = 0
        self.subset = torch.zeros(2, max_num_seqs, dtype=torch.int64, device=device)
        self.subset[1] = self.padding_slot
        self.masks = torch.full((max_num_seqs, -(-vocab_size // 32)), -1, dtype=torch.int32, device=device)
        num_lines = num_logit_lines(limits, max_num_seqs)
        self.logits = torch.zeros(num_lines, vocab_size, dtype=torch.float32, device=device)
        self.results = SampleResults.allocate(max_num_seqs, device=device)
        max_num_tokens = max(limits.max_num_batched_tokens, max_num_seqs)
        self.token_adapters = torch.full((max_num_tokens,), -1, dtype=torch.int32, device=device)
        num_slices = -(-max_num_tokens // num_lines)
        self.scores = ScoreLines.allocate(num_slices * num_lines, partial(torch.zeros, device=device))

        def numbers(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int64, device=device)

        self._inputs = StepInputs(
            context_lens=numbers(max_num_seqs),
            query_starts=numbers(max_num_seqs + 1),
            positions=numbers(max_num_tokens),
            slot_mapping=numbers(num_groups, max_num_tokens + max_num_tokens % 2),  # groups aligned alike
            token_ids=numbers(max_num_tokens),
            sampled_tokens=numbers(max_num_seqs),
        )

    def row_slots(self, num_rows: int) -> torch.Tensor:
        return self.rows[ROW_SLOTS, :num_rows]

    def row_lens(self, num_rows: int) -> torch.Tensor:
        return self.rows[ROW_LENS, :num_rows]

    def pair_rows(self, num_pairs: int) -> torch.Tensor:
        return self.rows[PAIR_ROWS, :num_pairs]

    def pair_slots(self, num_pairs: int) -> torch.Tensor:
        return self.rows[PAIR_SLOTS, :num_pairs]

    def step_inputs(self, *, num_tokens: int, num_rows: int, num_pairs: int) -> StepInputs:
        """Where the inputs of a step of this size are gathered, at the same addresses in every step."""
        inputs = self._inputs
        return StepInputs(
            context_lens=inputs.context_lens[:num_rows],
            query_starts=inputs.query_starts[: num_rows + 1],
            positions=inputs.positions[:num_tokens],
            slot_mapping=inputs.slot_mapping[:, :num_tokens],
            token_ids=inputs.token_ids[:num_tokens],
            sampled_tokens=inputs.sampled_tokens[:num_pairs],
        )
