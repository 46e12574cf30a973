"""Pooling: the hidden states of a text's tokens become one state, and that becomes its result.

Owns which tokens of a step are pooled, the running sums of texts that take several steps, and the way of the
results to the host. All of it runs behind the step, outside its graph, on what the forward has left in the
arena. The sums are of float32 and lie on the device, by slot: so a text that has lost its slot begins anew
(`SequenceGroup.keeps_device_state`). The layers behind pooling are `models/pooling.py`'s.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from graphllm.arena import Arena
from graphllm.batch import ScheduledBatch, ScheduledRow
from graphllm.models.family import PoolingMethod
from graphllm.models.pooling import Pooler
from graphllm.models.served import ServedModel


@dataclass(frozen=True, slots=True)
class PooledLine:
    """What of a step's row is pooled.

    first_token, num_tokens: which of the step's tokens, at least one. slot: of its running sum.
    is_continued: there is a sum already. divisor: of the whole sum. pair: the step's pair that ends the text,
    None in its middle.
    """

    first_token: int
    num_tokens: int
    slot: int
    is_continued: bool
    divisor: float
    pair: int | None


def pooled_lines(batch: ScheduledBatch, method: PoolingMethod) -> list[PooledLine]:
    """A line for each row that says something of its text's result.

    To be asked when the step is launched: its sequences then say where their rows begin.
    """
    if not batch.pools:
        return []
    pair_of_row = {pair.row: index for index, pair in enumerate(batch.pairs)}
    lines, first_token = [], 0
    for index, row in enumerate(batch.rows):
        if row.sequence.group.pooling:
            line = _pooled_line(row, method, first_token=first_token, pair=pair_of_row.get(index))
            if line is not None:
                lines.append(line)
        first_token += row.num_tokens
    return lines


def _pooled_line(
    row: ScheduledRow, method: PoolingMethod, *, first_token: int, pair: int | None
) -> PooledLine | None:
    num_tokens = row.num_tokens
    divisor: float = 1
    position = row.sequence.num_computed_tokens - num_tokens
    is_continued = position > 0
    if method == "last":
        if pair is None:
            return None
        first_token, num_tokens, is_continued = first_token + num_tokens - 1, 1, False
    elif method == "first":
        num_tokens = 1  # of a later row any: the sum is kept
    elif method == "mean":
        divisor = row.sequence.num_prompt_tokens
    elif method == "mean_sqrt":
        divisor = sqrt(row.sequence.num_prompt_tokens)
    return PooledLine(first_token, num_tokens, row.slot, is_continued, divisor, pair)


@dataclass(frozen=True, slots=True)
class DeviceLines:
    """Lines as a step's pooling reads them, on the device.

    tokens: [num_tokens] int64, which of the step's tokens, line by line. num_tokens, slots: [num_lines]
    int64. is_continued: [num_lines] bool. divisors: [num_lines] float32.
    """

    tokens: Tensor
    num_tokens: Tensor
    slots: Tensor
    is_continued: Tensor
    divisors: Tensor


class TextPooling:
    """Pools the texts of one model's steps."""

    def __init__(self, pooler: Pooler, *, num_slots: int, device: torch.device) -> None:
        self.config = pooler.config
        self._pooler = pooler
        self._sums: Tensor | None = None
        if self.config.method != "last":
            size = (num_slots, self.config.hidden_size)
            self._sums = torch.zeros(size, dtype=torch.float32, device=device)

    def pool(self, model: ServedModel, lines: DeviceLines, *, num_step_tokens: int, arena: Arena) -> Tensor:
        """The lines' results so far, [num_lines, output_size] float32: whole where the text ends.

        The step has num_step_tokens tokens, padding included, and was the last to run.
        """
        hidden = model.final_hidden(lines.tokens, num_tokens=num_step_tokens, arena=arena)
        states = arena.take("pooling.states", *hidden.shape, dtype=torch.float32)
        states.copy_(hidden)
        if self._sums is None:
            return self._pooler(states)  # type: ignore[no-any-return]
        earlier, is_continued = self._sums[lines.slots], lines.is_continued[:, None]
        if self.config.method == "first":
            pooled = earlier.where(is_continued, states)
        else:
            is_max = self.config.method == "max"
            # Unchecked, because a look at the lengths would wait for the device.
            pooled = torch.segment_reduce(
                states, "max" if is_max else "sum", lengths=lines.num_tokens, axis=0, unsafe=True
            )
            join = torch.maximum if is_max else torch.add
            pooled = join(earlier, pooled).where(is_continued, pooled)
        self._sums.index_copy_(0, lines.slots, pooled)
        return self._pooler(pooled / lines.divisors[:, None])  # type: ignore[no-any-return]

    def pool_largest(self, model: ServedModel, *, num_step_tokens: int, num_lines: int, arena: Arena) -> None:
        """Pool as many tokens as a step has, of no meaning: the arena is then as large as it gets."""
        device = arena.device
        num_tokens = num_lines if self.config.method in ("first", "last") else num_step_tokens
        lengths = torch.full((num_lines,), num_tokens // num_lines, device=device)
        lengths[0] += num_tokens % num_lines
        lines = DeviceLines(
            tokens=torch.zeros(num_tokens, dtype=torch.int64, device=device),
            num_tokens=lengths,
            slots=torch.arange(num_lines, device=device),
            is_continued=torch.zeros(num_lines, dtype=torch.bool, device=device),
            divisors=torch.ones(num_lines, dtype=torch.float32, device=device),
        )
        self.pool(model, lines, num_step_tokens=num_step_tokens, arena=arena)


def read_results(lines: list[PooledLine], results: Tensor) -> dict[int, array[float]]:
    """What the lines that end a text have brought, by their pair. results: [num_lines, output_size] float32,
    host memory that the next step will use again."""
    rows = results.numpy()
    return {
        line.pair: array("f", rows[index].tobytes())
        for index, line in enumerate(lines)
        if line.pair is not None
    }
