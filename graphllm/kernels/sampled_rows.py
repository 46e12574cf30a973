"""The rows that a step samples, and where each one's parameters lie on the device.

Owns the columns of the parameter tables, and the vectors that tie a row of logits to its slot. Owns
no operation: `runner/sampler.py` fills the tables, and every kernel of the sampler reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import triton
import triton.language as tl
from torch import Tensor


class FloatColumn(IntEnum):
    """Columns of the float32 parameters."""

    TEMPERATURE = 0
    TOP_P = 1
    MIN_P = 2
    REPETITION_PENALTY = 3
    PRESENCE_PENALTY = 4
    FREQUENCY_PENALTY = 5


class IntColumn(IntEnum):
    """Columns of the int64 parameters."""

    SEED = 0
    SIBLING = 1
    NUM_PROMPT_TOKENS = 2
    TOP_K = 3
    MIN_TOKENS = 4
    NUM_BIASES = 5


NUM_FLOATS = len(FloatColumn)
NUM_INTS = len(IntColumn)

_NUM_FLOATS: tl.constexpr = tl.constexpr(NUM_FLOATS)
_NUM_INTS: tl.constexpr = tl.constexpr(NUM_INTS)
TEMPERATURE: tl.constexpr = tl.constexpr(int(FloatColumn.TEMPERATURE))
TOP_P: tl.constexpr = tl.constexpr(int(FloatColumn.TOP_P))
MIN_P: tl.constexpr = tl.constexpr(int(FloatColumn.MIN_P))
REPETITION_PENALTY: tl.constexpr = tl.constexpr(int(FloatColumn.REPETITION_PENALTY))
PRESENCE_PENALTY: tl.constexpr = tl.constexpr(int(FloatColumn.PRESENCE_PENALTY))
FREQUENCY_PENALTY: tl.constexpr = tl.constexpr(int(FloatColumn.FREQUENCY_PENALTY))
SEED: tl.constexpr = tl.constexpr(int(IntColumn.SEED))
SIBLING: tl.constexpr = tl.constexpr(int(IntColumn.SIBLING))
NUM_PROMPT_TOKENS: tl.constexpr = tl.constexpr(int(IntColumn.NUM_PROMPT_TOKENS))
TOP_K: tl.constexpr = tl.constexpr(int(IntColumn.TOP_K))
MIN_TOKENS: tl.constexpr = tl.constexpr(int(IntColumn.MIN_TOKENS))
NUM_BIASES: tl.constexpr = tl.constexpr(int(IntColumn.NUM_BIASES))


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Pair i samples line `lines[i]` of the logits (line i without `lines`) for slot `slots[i]`.

    slots: [num_pairs] int64. lines: [num_pairs] int64 or None. floats: [num_slots, 6] float32, ints:
    [num_slots, 6] int64, by the columns above. lengths: [num_slots] int64, the number of tokens in
    front of the one that is sampled.
    """

    slots: Tensor
    lines: Tensor | None
    floats: Tensor
    ints: Tensor
    lengths: Tensor

    @property
    def num_pairs(self) -> int:
        return self.slots.shape[0]

    @property
    def lines_or_any(self) -> Tensor:
        """`lines`, or a pointer that a kernel compiled without lines does not read."""
        return self.slots if self.lines is None else self.lines


@triton.jit
def line_of(lines, pair, HAS_LINES: tl.constexpr):
    """The line of the logits and of the results that belongs to a pair; int64."""
    return tl.load(lines + pair) if HAS_LINES else pair.to(tl.int64)


@triton.jit
def load_float(floats, slot, COLUMN: tl.constexpr):
    """One float32 parameter of a slot."""
    return tl.load(floats + slot * _NUM_FLOATS + COLUMN)


@triton.jit
def load_int(ints, slot, COLUMN: tl.constexpr):
    """One int64 parameter of a slot."""
    return tl.load(ints + slot * _NUM_INTS + COLUMN)
