"""What happens to logits before the choice: penalties, bias, minimum length, grammar; and logprobs."""

from collections import Counter

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from graphllm.kernels.argmax import argmax_ref
from graphllm.kernels.grammar_bitmask import apply_bitmask_ref
from graphllm.kernels.logit_bias import apply_logit_bias_ref
from graphllm.kernels.logprobs import logprobs_ref
from graphllm.kernels.min_tokens import mask_early_stops_ref
from graphllm.kernels.penalties import Penalties, apply_penalties_ref

_INFINITY = float("inf")


def _penalized_row(
    row: list[float],
    history: list[int],
    num_prompt: int,
    *,
    repetition: float,
    presence: float,
    frequency: float,
) -> list[float]:
    output_counts = Counter(history[num_prompt:])
    changed = list(row)
    for token_id in set(history):
        value = row[token_id] / repetition if row[token_id] > 0 else row[token_id] * repetition
        count = output_counts[token_id]
        changed[token_id] = value - frequency * count - presence * (count > 0)
    return changed


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_penalties_follow_their_definition_row_by_row(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    num_rows, vocab_size, num_slots = 6, 37, 9
    logits = 3 * torch.randn(num_rows, vocab_size, generator=generator)
    token_table = torch.randint(0, vocab_size, (num_slots, 50), generator=generator).to(dtype)
    slots = torch.tensor([8, 0, 3, 5, 1, 7])
    lengths = torch.tensor([50, 1, 20, 10, 30, 0])
    prompt_lengths = torch.tensor([10, 1, 0, 10, 5, 0])
    for row, slot in enumerate(slots):  # what lies beyond the length is never read as a token
        token_table[slot, lengths[row] :] = -123_456
    penalties = Penalties(
        repetition=torch.tensor([1.3, 1.5, 0.8, 1.0, 1.0, 1.5]),
        presence=torch.tensor([0.5, -1.0, 0.0, 2.0, 0.0, 1.0]),
        frequency=torch.tensor([0.25, 1.0, -0.5, 2.0, 0.0, 1.0]),
    )
    expected = [
        _penalized_row(
            logits[row].tolist(),
            token_table[slots[row], : lengths[row]].tolist(),
            int(prompt_lengths[row]),
            repetition=float(penalties.repetition[row]),
            presence=float(penalties.presence[row]),
            frequency=float(penalties.frequency[row]),
        )
        for row in range(num_rows)
    ]
    untouched = logits[4:].clone()
    apply_penalties_ref(
        logits,
        penalties,
        token_table=token_table,
        slots=slots,
        lengths=lengths,
        prompt_lengths=prompt_lengths,
    )
    torch.testing.assert_close(logits, torch.tensor(expected), rtol=1e-6, atol=1e-6)
    assert torch.equal(logits[4:], untouched)  # neutral penalties; an empty history


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.2, 5.0])
def test_repetition_penalty_equals_that_of_transformers(penalty: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(30, 60, generator=generator)
    history = torch.randint(0, 60, (30, 25), generator=generator)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(history, logits.clone())
    apply_penalties_ref(
        logits,
        Penalties(torch.full((30,), penalty), torch.zeros(30), torch.zeros(30)),
        token_table=history,
        slots=torch.arange(30),
        lengths=torch.full((30,), 25),
        prompt_lengths=torch.full((30,), 10),
    )
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=0)
    assert torch.equal(argmax_ref(logits), expected.argmax(1))


def test_penalties_leave_no_infinity_or_nan_behind() -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0, -_INFINITY]])
    tiny = torch.finfo(torch.float32).tiny
    for repetition in (tiny, 100.0):
        changed = logits.clone()
        apply_penalties_ref(
            changed,
            Penalties(torch.tensor([repetition]), torch.tensor([2.0]), torch.tensor([2.0])),
            token_table=torch.tensor([[0, 1, 2, 3]]),
            slots=torch.tensor([0]),
            lengths=torch.tensor([4]),
            prompt_lengths=torch.tensor([0]),
        )
        assert not changed.isnan().any() and (changed < _INFINITY).all()
        assert changed[0, 3] == -_INFINITY


def test_bias_goes_to_its_tokens_and_stale_entries_count_for_nothing() -> None:
    logits = torch.zeros(3, 10)
    bias_ids = torch.tensor([[3, 9, 1], [4, 4, 4], [0, 2, 7]], dtype=torch.int32)
    bias_values = torch.tensor([[1.0, -100.0, 5.0], [9.0, 9.0, 9.0], [0.5, 1.5, 100.0]])
    apply_logit_bias_ref(logits, bias_ids, bias_values, num_biases=torch.tensor([2, 0, 3]))
    expected = torch.zeros(3, 10)
    expected[0, 3], expected[0, 9] = 1.0, -100.0
    expected[2, 0], expected[2, 2], expected[2, 7] = 0.5, 1.5, 100.0
    assert torch.equal(logits, expected)


def test_stop_tokens_are_masked_until_the_minimum_is_reached() -> None:
    logits = torch.zeros(4, 6)
    stop_ids = torch.tensor([[5, 2, -1], [5, 2, -1], [-1, -1, -1], [0, -1, -1]], dtype=torch.int32)
    mask_early_stops_ref(
        logits, stop_ids, output_lengths=torch.tensor([2, 3, 0, 0]), min_tokens=torch.tensor([3, 3, 3, 1])
    )
    is_masked = logits == -_INFINITY
    assert is_masked.nonzero().tolist() == [[0, 2], [0, 5], [3, 0]]
    assert (logits[~is_masked] == 0).all()


@pytest.mark.parametrize("vocab_size", [31, 32, 64, 100])
def test_bitmask_allows_exactly_the_set_bits(vocab_size: int) -> None:
    num_words = -(-vocab_size // 32)
    words = torch.randint(-(2**31), 2**31, (5, num_words), generator=torch.Generator().manual_seed(4))
    bitmask = words.to(torch.int32)
    bitmask[1] = -1
    bitmask[2] = 0
    logits = torch.arange(5.0)[:, None].expand(5, vocab_size).contiguous()
    apply_bitmask_ref(logits, bitmask)
    for row in range(5):
        for token_id in range(vocab_size):
            is_allowed = int(bitmask[row, token_id // 32]) >> token_id % 32 & 1
            assert float(logits[row, token_id]) == (float(row) if is_allowed else -_INFINITY)


@pytest.mark.parametrize("vocab_size", [5, 1000])
@pytest.mark.parametrize("num_top", [0, 1, 5])
def test_logprobs_equal_log_softmax(vocab_size: int, num_top: int) -> None:
    logits = 5 * torch.randn(8, vocab_size, generator=torch.Generator().manual_seed(6))
    logits[1] += 1e4
    logits[2, 1:] = -_INFINITY
    expected = logits.double().log_softmax(1).float()
    found = logprobs_ref(logits, num_top)
    torch.testing.assert_close(found.of(logits), expected, rtol=1e-5, atol=1e-5)
    top = expected.sort(dim=1, descending=True, stable=True)
    assert torch.equal(found.top_ids, top.indices[:, :num_top])
    torch.testing.assert_close(found.top_logprobs, top.values[:, :num_top], rtol=1e-5, atol=1e-5)


def test_logprobs_of_a_row_of_minus_infinity_are_minus_infinity() -> None:
    logits = torch.full((1, 7), -_INFINITY)
    found = logprobs_ref(logits, 3)
    assert (found.of(logits) == -_INFINITY).all() and (found.top_logprobs == -_INFINITY).all()
    assert found.top_ids.tolist() == [[0, 1, 2]]
