"""The reference of a step's inputs, against loops in Python over random slot tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphllm.kernels.step_inputs import StepInputs, step_inputs_ref

NUM_GROUPS = 2
NUM_SLOTS = 7
MAX_BLOCKS = 9
_GUARD = 64  # entries before and after each output


@dataclass(frozen=True, slots=True)
class Step:
    """A step's arguments as Python values; `num_tokens` may exceed the rows' and rows may be empty."""

    row_slots: list[int]
    query_lens: list[int]
    pair_rows: list[int]
    num_computed_tokens: list[int]
    block_size: int
    num_tokens: int
    is_decode: bool

    @property
    def table_width(self) -> int:
        return MAX_BLOCKS * self.block_size + 1


def slot_tables(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """Block and token tables without two equal entries, so that no wrong place can look right."""
    num_blocks = NUM_GROUPS * NUM_SLOTS * MAX_BLOCKS
    block_tables = 1 + torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0))
    token_table = 1 + torch.randperm(NUM_SLOTS * step.table_width, generator=torch.Generator().manual_seed(1))
    return block_tables.view(NUM_GROUPS, NUM_SLOTS, -1).int(), token_table.view(NUM_SLOTS, -1).int()


def expected_inputs(step: Step) -> dict[str, list[Any]]:
    """What `step_inputs` has to write, by the formulas."""
    block_tables, token_table = (table.tolist() for table in slot_tables(step))
    positions = [0] * step.num_tokens
    slot_mapping = [[-1] * step.num_tokens for _ in range(NUM_GROUPS)]
    token_ids, context_lens, query_starts = [0] * step.num_tokens, [], [0]
    for row, (slot, query_len) in enumerate(zip(step.row_slots, step.query_lens, strict=True)):
        num_computed = step.num_computed_tokens[slot]
        context_lens.append(num_computed + query_len if query_len else 0)
        first_token = query_starts[-1]
        for position in range(num_computed, num_computed + query_len):
            token = first_token + position - num_computed
            positions[token] = position
            for group in range(NUM_GROUPS):
                block = block_tables[group][slot][position // step.block_size]
                slot_mapping[group][token] = block * step.block_size + position % step.block_size
            token_ids[token] = token_table[slot][position]
        query_starts.append(row + 1 if step.is_decode else first_token + query_len)
    sampled_tokens = [max(query_starts[row + 1] - 1, 0) for row in step.pair_rows]
    return {
        "context_lens": context_lens,
        "query_starts": query_starts,
        "positions": positions,
        "slot_mapping": slot_mapping,
        "token_ids": token_ids,
        "sampled_tokens": sampled_tokens,
    }


def written_inputs(
    step: Step,
    run: Callable[..., None] = step_inputs_ref,
    *,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> dict[str, list[Any]]:
    """What `run` writes into memory that held rubbish before; it may not write to anything else."""
    sizes = {name: torch.tensor(values).shape for name, values in expected_inputs(step).items()}
    memory = {
        name: torch.full((*size[:-1], _GUARD + size[-1] + _GUARD), -77, device=device)
        for name, size in sizes.items()
    }
    out = StepInputs(**{name: memory[name][..., _GUARD : _GUARD + size[-1]] for name, size in sizes.items()})
    block_tables, token_table = slot_tables(step)
    arguments = {
        "row_slots": torch.tensor(step.row_slots, device=device),
        "query_lens": torch.tensor(step.query_lens, device=device),
        "pair_rows": torch.tensor(step.pair_rows, dtype=torch.int64, device=device),
        "num_computed_tokens": torch.tensor(step.num_computed_tokens, device=device),
        "block_tables": block_tables.to(device),
        "token_table": token_table.to(device),
    }
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    run(**arguments, block_size=step.block_size, is_decode=step.is_decode, out=out)
    assert all(torch.equal(arguments[name], tensor) for name, tensor in before.items())
    for tensor in memory.values():
        assert (tensor[..., :_GUARD] == -77).all() and (tensor[..., -_GUARD:] == -77).all()
    return {field.name: getattr(out, field.name).tolist() for field in fields(out)}


@st.composite
def steps(draw: st.DrawFn) -> Step:
    is_decode = draw(st.booleans())
    block_size = draw(st.sampled_from([1, 3, 16]))
    num_rows = draw(st.integers(1, NUM_SLOTS))
    row_slots = draw(st.permutations(range(NUM_SLOTS)))[:num_rows]
    longest = 1 if is_decode else 2 * block_size + 1
    query_lens = draw(st.lists(st.integers(0, longest), min_size=num_rows, max_size=num_rows))
    most = MAX_BLOCKS * block_size - longest
    num_computed = draw(st.lists(st.integers(0, most), min_size=NUM_SLOTS, max_size=NUM_SLOTS))
    num_tokens = num_rows if is_decode else sum(query_lens) + draw(st.integers(0, 20))
    pair_rows = draw(st.lists(st.integers(0, num_rows - 1), max_size=9))
    return Step(row_slots, query_lens, pair_rows, num_computed, block_size, num_tokens, is_decode)


@settings(max_examples=300, deadline=None)
@given(step=steps())
def test_reference_writes_what_the_formulas_say(step: Step) -> None:
    assert written_inputs(step) == expected_inputs(step)


def test_a_row_whose_context_is_full_may_still_be_padding() -> None:
    # A padding row's slot can hold anything: its lengths and tables are never looked up out of range.
    step = Step([0, 6], [1, 0], [0], [3, 0, 0, 0, 0, 0, MAX_BLOCKS * 4], 4, 2, True)
    assert written_inputs(step) == expected_inputs(step)
    mixed = Step([0, 6], [2, 0], [0], [3, 0, 0, 0, 0, 0, MAX_BLOCKS * 4], 4, 5, False)
    assert written_inputs(mixed) == expected_inputs(mixed)


@pytest.mark.parametrize("is_decode", [False, True])
def test_padding_tokens_store_nothing(is_decode: bool) -> None:
    step = Step([1, 2, 3, 4], [1, 1, 0, 0], [0, 1], [5, 0, 9, 9, 9, 9, 9], 4, 4, is_decode)
    written = written_inputs(step)
    for slot_mapping in written["slot_mapping"]:
        assert slot_mapping[2:] == [-1, -1] and min(slot_mapping[:2]) >= 0
    assert written["positions"][2:] == [0, 0] and written["token_ids"][2:] == [0, 0]
    assert written["context_lens"] == [1, 10, 0, 0]
