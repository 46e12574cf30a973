"""The work list of a step's attention on a CPU: rows of similar length, to be attended in one call.

Owns which rows go together, the cache slots they read and what their queries may see. Computes no
attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from graphllm.attention.backend import AttentionInputs

# What one more group costs in each layer, in gathered tokens: the exchange rate of calls and padding.
_GROUP_COST_TOKENS = 256
# Keys and values of a group should stay in the processor's cache between the gather and the product.
_MAX_GROUP_TOKENS = 8192


@dataclass(slots=True)
class RowGroup:
    """Rows with the same number of queries; shorter contexts are padded to the longest one's length.

    tokens: where the queries lie in the batch, a slice or, for decode rows out of order, [num_rows] int64.
    row_slots, context_lens: [num_rows] int64. positions: [num_rows or 1, max_context] int64, the tokens that
    are read; padding repeats a row's last token, so that no slot is read that the row does not own.
    """

    tokens: slice | torch.Tensor
    row_slots: torch.Tensor
    query_len: int
    positions: torch.Tensor
    context_lens: torch.Tensor
    is_padded: bool
    _slots: dict[int, torch.Tensor] = field(default_factory=dict)
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)
    _within: dict[int, RowGroup] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return len(self.row_slots)

    @property
    def max_context(self) -> int:
        return self.positions.shape[1]

    def within(self, sliding_window: int | None) -> RowGroup:
        """The same queries over those tokens alone that any of them sees through the window.

        `context_lens` count from each row's first such token, which moves queries and keys alike. Built by
        the first layer that asks, and kept for the others.
        """
        width = self.max_context if sliding_window is None else sliding_window + self.query_len - 1
        if sliding_window is None or width >= self.max_context:
            return self
        if sliding_window not in self._within:
            first = (self.context_lens - width).clamp_(min=0)  # [num_rows] int64
            positions = first[:, None] + torch.arange(width)  # [num_rows, width] int64
            self._within[sliding_window] = RowGroup(
                tokens=self.tokens,
                row_slots=self.row_slots,
                query_len=self.query_len,
                positions=positions.minimum(self.context_lens[:, None] - 1),
                context_lens=self.context_lens - first,
                is_padded=int(self.context_lens.min()) < width,
            )
        return self._within[sliding_window]

    def slots(self, inputs: AttentionInputs, group: int, *, block_size: int) -> torch.Tensor:
        """Where a group of layers keeps the tokens, [num_rows * max_context] int64.

        Built by the group's first layer that asks, and kept for the others.
        """
        if group not in self._slots:
            tables = inputs.groups[group].block_tables[self.row_slots]  # [num_rows, max_blocks] int32
            blocks = tables.gather(1, (self.positions // block_size).expand(self.num_rows, -1))
            slots = blocks * block_size + self.positions % block_size  # [num_rows, max_context] int64
            self._slots[group] = slots.view(-1)
        return self._slots[group]

    def is_causal(self, sliding_window: int | None) -> bool:
        """Whether the plain causal triangle says it all: a prompt from its start."""
        whole = self.query_len == self.max_context and self.query_len > 1
        return whole and (sliding_window is None or sliding_window >= self.max_context)

    def mask(self, sliding_window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """0 where a query sees a key, else -inf: [num_rows, 1, query_len, max_context] of `dtype`.

        None where `is_causal` says it, or every query sees all. Built by the first layer that asks, which
        knows window and dtype, and kept for the others.
        """
        is_windowed = sliding_window is not None and sliding_window < self.max_context
        sees_all = self.query_len == 1 and not self.is_padded and not is_windowed
        if sees_all or self.is_causal(sliding_window):
            return None
        if sliding_window not in self._masks:
            positions = torch.arange(self.max_context)
            first_queries = (self.context_lens - self.query_len)[:, None, None]
            queries = first_queries + torch.arange(self.query_len)[:, None]  # [num_rows, query_len, 1]
            hidden = positions > queries  # [num_rows, query_len, max_context] bool
            if sliding_window is not None:
                hidden |= positions <= queries - sliding_window
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
            self._masks[sliding_window] = mask[:, None]
        return self._masks[sliding_window]

    def band(self, sliding_window: int | None, dtype: torch.dtype) -> torch.Tensor | None:
        """The mask of queries that see what lies nearer than the window on either side.

        [1, 1, query_len, max_context] of `dtype`; None where they see all. Every row is a whole prompt.
        """
        assert self.query_len == self.max_context and not self.is_padded, "whole prompts only"
        if sliding_window is None or sliding_window >= self.max_context:
            return None
        if sliding_window not in self._masks:
            positions = torch.arange(self.max_context)
            hidden = (positions - positions[:, None]).abs() >= sliding_window
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
            self._masks[sliding_window] = mask[None, None]
        return self._masks[sliding_window]


def group_rows(inputs: AttentionInputs, *, num_decode_rows: int) -> list[RowGroup]:
    """Group a step's rows: decode rows by length, each prefill row by itself. Reads the lengths."""
    groups = []
    for rows in rows_of_similar_length(inputs.context_lens[:num_decode_rows].tolist()):
        is_run = all(row == rows[0] + index for index, row in enumerate(rows))
        decode_tokens = slice(rows[0], rows[-1] + 1) if is_run else torch.tensor(rows)
        groups.append(_row_group(inputs, decode_tokens, decode_tokens, query_len=1))
    start = num_decode_rows
    for row, query_len in enumerate(inputs.query_lens[num_decode_rows:].tolist(), num_decode_rows):
        tokens = slice(start, start + query_len)
        groups.append(_row_group(inputs, slice(row, row + 1), tokens, query_len=query_len))
        start += query_len
    return groups


def rows_of_similar_length(context_lens: Sequence[int]) -> list[list[int]]:
    """Split rows so that padding each part to its longest row is cheaper than another part.

    One part in the rows' own order when that is good enough, else parts from long rows to short.
    """
    if not context_lens:
        return []
    num_padded = len(context_lens) * max(context_lens)
    if num_padded <= _MAX_GROUP_TOKENS and num_padded - sum(context_lens) <= _GROUP_COST_TOKENS:
        return [list(range(len(context_lens)))]
    order = sorted(range(len(context_lens)), key=context_lens.__getitem__, reverse=True)
    parts, padding = [[order[0]]], 0
    for row in order[1:]:
        part = parts[-1]
        longest = context_lens[part[0]]
        padding += longest - context_lens[row]
        if padding > _GROUP_COST_TOKENS or (len(part) + 1) * longest > _MAX_GROUP_TOKENS:
            parts.append([row])
            padding = 0
        else:
            part.append(row)
    return parts


def _row_group(
    inputs: AttentionInputs, rows: slice | torch.Tensor, tokens: slice | torch.Tensor, *, query_len: int
) -> RowGroup:
    context_lens = inputs.context_lens[rows]  # [num_rows] int64
    max_context = int(context_lens.max())
    is_padded = len(context_lens) > 1 and int(context_lens.min()) < max_context
    positions = torch.arange(max_context)[None]  # [1, max_context] int64
    if is_padded:
        positions = positions.minimum(context_lens[:, None] - 1)  # [num_rows, max_context]
    return RowGroup(
        tokens=tokens,
        row_slots=inputs.row_slots[rows],
        query_len=query_len,
        positions=positions,
        context_lens=context_lens,
        is_padded=is_padded,
    )
