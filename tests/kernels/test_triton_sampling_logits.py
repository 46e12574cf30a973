"""Kernels before and after the draw: adjusted rows, row maxima, argmax, the last resort, logprobs."""

import pytest
import torch

from graphllm.kernels.adjusted_logits import AdjustedLogits, adjust_logits
from graphllm.kernels.argmax import argmax_ref, chunk_argmax
from graphllm.kernels.chosen_tokens import chosen_tokens
from graphllm.kernels.logit_bias import apply_logit_bias_ref
from graphllm.kernels.logprobs import logprobs_ref, write_logprobs
from graphllm.kernels.min_tokens import mask_early_stops_ref
from graphllm.kernels.penalties import Penalties, apply_penalties_ref
from graphllm.kernels.row_maxima import row_maxima
from graphllm.kernels.sampled_rows import FloatColumn, IntColumn, SampledRows
from graphllm.kernels.vocab_tiles import CHUNK_SIZE, TILE_SIZE, num_chunks
from tests.kernels.device import DEVICE
from tests.kernels.sampling_rows import empty_maxima, make_rows, unadjusted

pytestmark = pytest.mark.triton

_INFINITY = float("inf")
_LARGEST = torch.finfo(torch.float32).max


def _clean(logits: torch.Tensor) -> torch.Tensor:
    return logits.nan_to_num(nan=-_INFINITY, posinf=_LARGEST, neginf=-_INFINITY)


def _adjust(
    logits: torch.Tensor, rows: SampledRows, tables: dict[str, torch.Tensor], changed: torch.Tensor
) -> torch.Tensor:
    adjusted = AdjustedLogits(logits.to(DEVICE), changed.to(DEVICE), None)
    adjust_logits(adjusted, rows, **{name: table.to(DEVICE) for name, table in tables.items()})
    return adjusted.changed.cpu()


def _adjusting_case(
    vocab_size: int, *, max_length: int
) -> tuple[torch.Tensor, SampledRows, dict[str, torch.Tensor]]:
    """Eight rows, of which the last two have nothing to adjust."""
    generator = torch.Generator().manual_seed(vocab_size)
    num_pairs = 8
    logits = 3 * torch.randn(num_pairs, vocab_size, generator=generator)
    logits[0, ::7] = -_INFINITY
    logits[1, ::5] = float("nan")
    logits[2, ::3] = _INFINITY
    lengths = [max_length, max_length - 1, 3, 1, 40, 0, 60, 9]
    prompts = [max_length // 2, 0, 3, 0, 10, 0, 50, 4]
    rows = make_rows(
        num_pairs,
        float_columns={
            FloatColumn.REPETITION_PENALTY: [1.3, 0.6, 2.0, 1.0, 1.0, 1.7, 1.0, 1.0],
            FloatColumn.PRESENCE_PENALTY: [0.5, -1.0, 0.0, 2.0, 0.0, 1.0, 0.0, 0.0],
            FloatColumn.FREQUENCY_PENALTY: [0.25, 0.1, -0.5, 0.0, 0.0, 1.0, 0.0, 0.0],
        },
        int_columns={
            IntColumn.NUM_PROMPT_TOKENS: prompts,
            IntColumn.NUM_BIASES: [2, 0, 512, 1, 100, 0, 0, 0],
            IntColumn.MIN_TOKENS: [max_length, 5, 1, 1, 31, 1, 10, 5],
        },
        lengths=lengths,
    )
    small = torch.randint(0, max(2, vocab_size // 20), (num_pairs, max_length + 5), generator=generator)
    bias_ids = torch.stack([torch.randperm(vocab_size, generator=generator)[:512] for _ in range(num_pairs)])
    stop_ids = torch.full((num_pairs, 80), -1)
    stop_ids[:, :3] = torch.tensor([0, 17, vocab_size - 1])
    stop_ids[0] = torch.arange(80)
    tables = {
        "token_table": small.int(),
        "bias_ids": bias_ids.int(),
        "bias_values": torch.randn(num_pairs, 512, generator=generator),
        "stop_ids": stop_ids.int(),
    }
    for slot in range(num_pairs):  # the history ends where the length says
        tables["token_table"][slot, int(rows.lengths[slot]) :] = 2**30
    return logits, rows, tables


def _adjust_ref(logits: torch.Tensor, rows: SampledRows, tables: dict[str, torch.Tensor]) -> torch.Tensor:
    slots = rows.slots.cpu()
    floats, ints, lengths = rows.floats.cpu()[slots], rows.ints.cpu()[slots], rows.lengths.cpu()[slots]
    prompt_lengths = ints[:, IntColumn.NUM_PROMPT_TOKENS]
    changed = _clean(logits)
    apply_penalties_ref(
        changed,
        Penalties(
            repetition=floats[:, FloatColumn.REPETITION_PENALTY],
            presence=floats[:, FloatColumn.PRESENCE_PENALTY],
            frequency=floats[:, FloatColumn.FREQUENCY_PENALTY],
        ),
        token_table=tables["token_table"],
        slots=slots,
        lengths=lengths,
        prompt_lengths=prompt_lengths,
    )
    apply_logit_bias_ref(
        changed,
        tables["bias_ids"][slots],
        tables["bias_values"][slots],
        num_biases=ints[:, IntColumn.NUM_BIASES],
    )
    mask_early_stops_ref(
        changed,
        tables["stop_ids"][slots],
        output_lengths=lengths - prompt_lengths,
        min_tokens=ints[:, IntColumn.MIN_TOKENS],
    )
    return changed


@pytest.mark.parametrize(("vocab_size", "max_length"), [(515, 70), (2500, 5000)])
def test_adjusted_rows_are_the_references_bit_for_bit(vocab_size: int, max_length: int) -> None:
    logits, rows, tables = _adjusting_case(vocab_size, max_length=max_length)
    changed = _adjust(logits, rows, tables, torch.full_like(logits, float("nan")))
    assert torch.equal(changed[:6], _adjust_ref(logits, rows, tables)[:6])


def test_rows_that_nothing_adjusts_have_no_copy() -> None:
    logits, rows, tables = _adjusting_case(515, max_length=70)
    changed = _adjust(logits, rows, tables, torch.full_like(logits, 7.0))
    assert (changed[6:] == 7.0).all()


@pytest.mark.parametrize("vocab_size", [5, 515, 2048, 4100])
def test_row_maxima_are_those_of_chunks_and_tiles(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(3, vocab_size, generator=generator).mul(2).round()  # ties
    logits[1, 3:] = -_INFINITY
    logits[2, ::2] = float("nan")
    masks = torch.randint(-(2**31), 2**31, (3, -(-vocab_size // 32)), generator=generator).int()
    masks[:2] = -1
    masks[2, 0] |= 2
    columns = {FloatColumn.TOP_P: [0.5] * 3, FloatColumn.TEMPERATURE: [0.7, 2.0, 1.0]}
    rows = make_rows(3, float_columns=columns, lines=[1, 2, 0])
    adjusted = unadjusted(logits, masks)
    out = row_maxima(adjusted, rows, out=empty_maxima(3, vocab_size))

    bits = (masks[:, :, None] >> torch.arange(32)) & 1
    allowed = bits.flatten(1)[:, :vocab_size] > 0
    expected = _clean(logits)[[1, 2, 0]].masked_fill(~allowed, -_INFINITY)
    temperatures = torch.tensor([0.7, 2.0, 1.0])[:, None]
    for chunk in range(num_chunks(vocab_size)):
        part = expected[:, chunk * CHUNK_SIZE : (chunk + 1) * CHUNK_SIZE]
        keys = out.best[:, chunk].cpu()
        assert (0xFFFFFFFF - (keys & 0xFFFFFFFF)).tolist() == (chunk * CHUNK_SIZE + argmax_ref(part)).tolist()
        maxima = part.amax(1, keepdim=True).clamp(min=-_LARGEST)
        masses = ((part - maxima) / temperatures).exp().sum(1)
        torch.testing.assert_close(out.masses[:, chunk].cpu(), masses, rtol=1e-5, atol=0)
    padded = torch.nn.functional.pad(expected, (0, -vocab_size % TILE_SIZE), value=-_INFINITY)
    assert torch.equal(out.tiles.cpu(), padded.view(3, -1, TILE_SIZE).amax(2))


def _choose(logits: torch.Tensor, *, lines: list[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens by kernels, and the slots' token table with the tokens in it."""
    num_pairs, vocab_size = len(lines or logits), logits.shape[1]
    logits = logits.to(DEVICE)
    rows = make_rows(num_pairs, lengths=range(num_pairs), lines=lines)
    keys = torch.empty(num_pairs, num_chunks(vocab_size), dtype=torch.int64, device=DEVICE)
    chunk_argmax(logits, rows, out=keys)
    token_table = torch.full((num_pairs, num_pairs), -7, dtype=torch.int32, device=DEVICE)
    token_ids = torch.full((logits.shape[0],), -7, device=DEVICE)
    chosen_tokens(keys, logits, rows=rows, token_table=token_table, out=token_ids)
    return token_ids.cpu(), token_table.cpu()


@pytest.mark.parametrize("vocab_size", [1, 515, 2048, 6000])
def test_greedy_takes_the_lowest_of_the_best_whatever_is_broken(vocab_size: int) -> None:
    logits = torch.randn(6, vocab_size, generator=torch.Generator().manual_seed(9)).mul(3).round()
    logits[1, ::2] = float("nan")
    logits[2] = -_INFINITY
    logits[3] = float("nan")
    logits[4, vocab_size // 2 :] = _INFINITY
    logits[5, :] = -0.0
    logits[5, vocab_size // 3 :] = 0.0
    token_ids, token_table = _choose(logits)
    assert token_ids.tolist() == argmax_ref(_clean(logits)).tolist()
    for pair in range(6):  # pair i has slot 5 - i and length i
        assert int(token_table[5 - pair, pair]) == int(token_ids[pair])
    assert (token_table == -7).sum() == 30


def test_greedy_of_a_full_vocabulary_finds_the_best_in_any_chunk() -> None:
    logits = torch.randn(1, 128_256, generator=torch.Generator().manual_seed(2))
    logits[0, [128_255, 77_000]] = 9.0
    assert _choose(logits)[0].tolist() == [77_000]


def test_pairs_read_and_write_the_lines_they_are_given() -> None:
    logits = torch.zeros(5, 300)
    logits[torch.arange(5), 10 * torch.arange(1, 6)] = 1.0
    assert _choose(logits, lines=[4, 0, 2])[0].tolist() == [10, -7, 30, -7, 50]


@pytest.mark.parametrize("vocab_size", [7, 515, 4100])
def test_logprobs_and_alternatives_are_the_references(vocab_size: int) -> None:
    logits = 4 * torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    logits[1] = logits[1].round()
    logits[2] = -_INFINITY
    logits[3, 1:] = float("nan")
    logits[0, -1] = _INFINITY if vocab_size == 7 else 1.0
    lines = [3, 1, 0, 2]
    num_top = 20
    chunks = num_chunks(vocab_size)
    token_ids = torch.tensor([0, vocab_size - 1, 2, vocab_size // 2])
    logprobs = torch.full((4,), float("nan"), device=DEVICE)
    top_ids = torch.full((4, num_top), -7, device=DEVICE)
    top_logprobs = torch.full((4, num_top), float("nan"), device=DEVICE)
    write_logprobs(
        logits.to(DEVICE),
        make_rows(4, lines=lines),
        chunk_top_keys=torch.empty(4, chunks, num_top, dtype=torch.int64, device=DEVICE),
        chunk_masses=torch.empty(4, chunks, device=DEVICE),
        token_ids=token_ids.to(DEVICE),
        out=(logprobs, top_ids, top_logprobs),
    )
    expected = logprobs_ref(_clean(logits), num_top)
    width = min(num_top, vocab_size)
    chosen = expected.of(_clean(logits).gather(1, token_ids[:, None]))[:, 0]
    torch.testing.assert_close(logprobs.cpu(), chosen, rtol=1e-6, atol=1e-5)
    assert torch.equal(top_ids[:, :width].cpu(), expected.top_ids)
    torch.testing.assert_close(top_logprobs[:, :width].cpu(), expected.top_logprobs, rtol=1e-6, atol=1e-5)
    assert (top_ids[:, width:] == 0).all() and (top_logprobs[:, width:] == -_INFINITY).all()
