"""Sampling in kernels gives what the specification gives, whatever is mixed, padded, masked or broken."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy
import pytest
import torch

from graphllm.arena import Arena
from graphllm.runner.device_sampler import SampleResults, sample_on_device
from graphllm.runner.sampler import (
    SampledTokens,
    SamplerKind,
    SamplerVariant,
    SamplingTables,
    pack_sampling_row,
    sample,
)
from graphllm.sampling_params import MAX_LOGPROBS, SamplingParams
from tests.kernels.device import DEVICE
from tests.runner.exact_distribution import EOS, exact_probabilities, p_value

pytestmark = pytest.mark.triton

_CPU = torch.device("cpu")
_INFINITY = float("inf")
_MAX_LENGTH = 60
_ALL = SamplerVariant(penalties=True, bias=True, random=True, filters=True, num_logprobs=MAX_LOGPROBS)


@pytest.fixture(autouse=True)
def _silent_arithmetic() -> Iterator[None]:
    """Interpreted arithmetic warns of overflows and of NaN, which a card computes in silence."""
    with numpy.errstate(all="ignore"):
        yield


class _Batch:
    """Slots with parameters and histories, on the CPU for `sample` and on the device for kernels."""

    def __init__(self, params: Sequence[SamplingParams], vocab_size: int, *, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        num_slots = len(params)
        self.tables = SamplingTables.allocate(num_slots, device=_CPU)
        for slot, slot_params in enumerate(params):
            row = pack_sampling_row(
                slot_params,
                seed=slot * 2**33 - 5,
                sibling=slot % 3,
                num_prompt_tokens=20,
                eos_token_ids=(EOS,),
            )
            self.tables.write_row(slot, row)
        self.token_table = torch.randint(
            0, min(vocab_size, 40), (num_slots, _MAX_LENGTH + 1), generator=generator
        ).int()
        self.lengths = torch.randint(20, _MAX_LENGTH, (num_slots,), generator=generator)
        self.logits = 3 * torch.randn(num_slots, vocab_size, generator=generator)
        self.arena = Arena(DEVICE)

    def expected(
        self, slots: Sequence[int], logits: torch.Tensor, masks: torch.Tensor | None
    ) -> SampledTokens:
        return sample(
            logits,
            slots=torch.tensor(slots),
            tables=self.tables,
            variant=_ALL,
            token_table=self.token_table,
            lengths=self.lengths,
            mask=masks,
        )

    def sample(
        self,
        slots: Sequence[int] | None = None,
        *,
        kind: SamplerKind = SamplerKind.GENERAL,
        logits: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
        lines: Sequence[int] | None = None,
    ) -> tuple[SampleResults, torch.Tensor]:
        """Results, with -7 and NaN where nothing was written, and the token table afterwards."""
        slots = list(range(self.lengths.numel())) if slots is None else slots
        logits = self.logits[list(slots)] if logits is None else logits
        results = SampleResults.allocate(logits.shape[0], device=DEVICE)
        results.token_ids.fill_(-7)
        results.logprobs.fill_(float("nan"))
        token_table = self.token_table.clone().to(DEVICE)
        tables = SamplingTables(
            **{name: getattr(self.tables, name).to(DEVICE) for name in SamplingTables.__slots__}
        )
        sample_on_device(
            logits.to(DEVICE),
            slots=torch.tensor(slots, device=DEVICE),
            tables=tables,
            kind=kind,
            token_table=token_table,
            lengths=self.lengths.to(DEVICE),
            results=results,
            arena=self.arena,
            masks=None if masks is None else masks.to(DEVICE),
            lines=None if lines is None else torch.tensor(lines, device=DEVICE),
        )
        on_cpu = SampleResults(**{name: getattr(results, name).cpu() for name in SampleResults.__slots__})
        return on_cpu, token_table.cpu()


def _random_params(generator: random.Random, vocab_size: int) -> SamplingParams:
    """A mixture in which each parameter is at rest half of the time."""

    def often(rest: float, *others: float) -> float:
        return rest if generator.random() < 0.5 else generator.choice(others)

    bias = {
        generator.randrange(vocab_size): generator.uniform(-20, 20) for _ in range(generator.choice([1, 9]))
    }
    return SamplingParams(
        temperature=often(1.0, 0.0, 0.3, 1.7, 1e-30),
        top_k=int(often(0, 1, 5, 50, 400)),
        top_p=often(1.0, 0.1, 0.8, 0.95),
        min_p=often(0.0, 0.02, 0.2),
        repetition_penalty=often(1.0, 0.7, 1.4),
        presence_penalty=often(0.0, -1.0, 0.6),
        frequency_penalty=often(0.0, -0.4, 0.5),
        logit_bias=bias if generator.random() < 0.4 else None,
        min_tokens=int(often(0, 10, 40)),
        stop_token_ids=(1, 3),
    )


@pytest.mark.parametrize(("vocab_size", "num_pairs", "has_masks"), [(515, 24, False), (2500, 14, True)])
def test_any_mixture_of_parameters_gives_the_specifications_tokens(
    vocab_size: int, num_pairs: int, has_masks: bool
) -> None:
    generator = random.Random(vocab_size)
    batch = _Batch([_random_params(generator, vocab_size) for _ in range(num_pairs)], vocab_size)
    masks = None
    if has_masks:
        shape = (num_pairs, -(-vocab_size // 32))
        words = torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(7))
        masks = words.int()
        masks[::3] = -1
        masks[1] = 0  # a grammar that allows nothing
    slots = list(range(num_pairs))
    generator.shuffle(slots)
    logits = batch.logits[slots]
    expected = batch.expected(slots, logits, masks)
    results, token_table = batch.sample(slots, kind=SamplerKind.LOGPROBS, masks=masks)

    assert expected.logprobs is not None and expected.top_ids is not None
    assert results.token_ids.tolist() == expected.token_ids.tolist()
    assert torch.equal(results.top_ids, expected.top_ids)
    torch.testing.assert_close(results.logprobs, expected.logprobs, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(results.top_logprobs, expected.top_logprobs, rtol=1e-6, atol=1e-5)
    written = batch.token_table.clone()
    written[slots, batch.lengths[slots]] = expected.token_ids.int()
    assert torch.equal(token_table, written)


def test_a_row_gets_its_token_whatever_stands_beside_it() -> None:
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(),
        SamplingParams(top_p=0.8, repetition_penalty=1.4),
        SamplingParams(top_k=9, temperature=1.5, logit_bias={4: 3.0}),
    ]
    batch = _Batch(params, 515)
    together = batch.sample()[0].token_ids.tolist()
    for slot in range(4):
        others = [(slot + step) % 4 for step in range(1, 4)]
        assert batch.sample([slot])[0].token_ids.tolist() == [together[slot]]
        assert int(batch.sample([*others, slot])[0].token_ids[3]) == together[slot]


def test_siblings_of_one_seed_and_neighbouring_positions_draw_apart() -> None:
    batch = _Batch([SamplingParams()] * 12, 515)
    batch.tables.ints[:] = batch.tables.ints[:1]
    batch.lengths[:] = 30
    batch.tables.ints[4:8, 1] = torch.arange(4) + 1  # siblings
    batch.lengths[8:] = 31 + torch.arange(4)
    tokens = batch.sample(logits=torch.zeros(12, 515))[0].token_ids.tolist()
    assert len(set(tokens[:4])) == 1
    assert len(set(tokens)) >= 8


def test_draws_among_ties_reach_the_last_token_that_is_kept_and_none_beyond() -> None:
    batch = _Batch([SamplingParams(top_k=2)] * 16, 515)
    logits = torch.zeros(16, 515)
    logits[:, :300] = -1.0
    tokens = batch.sample(logits=logits)[0].token_ids.tolist()
    assert set(tokens) == {300, 301}


def test_held_back_rows_are_sampled_later_from_their_own_lines() -> None:
    params = [
        SamplingParams(),
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=3),
        SamplingParams(min_p=0.1),
    ]
    batch = _Batch(params, 515)
    whole, _ = batch.sample(kind=SamplerKind.LOGPROBS)
    masks = torch.full((2, 17), -1, dtype=torch.int32)
    held, token_table = batch.sample(
        [3, 1], kind=SamplerKind.LOGPROBS, logits=batch.logits, masks=masks, lines=[3, 1]
    )
    assert held.token_ids.tolist() == [-7, int(whole.token_ids[1]), -7, int(whole.token_ids[3])]
    assert torch.equal(held.logprobs[[1, 3]], whole.logprobs[[1, 3]]) and held.logprobs[[0, 2]].isnan().all()
    changed = (token_table != batch.token_table).any(1)
    assert not changed[[0, 2]].any()


def test_padding_pairs_harm_nobody() -> None:
    batch = _Batch([SamplingParams(top_p=0.9), SamplingParams(presence_penalty=1.0)], 515)
    padded = _Batch(
        [SamplingParams(top_p=0.9), SamplingParams(presence_penalty=1.0), SamplingParams(temperature=0.0)],
        515,
    )
    padded.token_table[:2], padded.lengths[:2] = batch.token_table, batch.lengths
    padded.lengths[2] = 0
    logits = torch.cat((batch.logits, torch.full((3, 515), float("nan"))))
    results, token_table = padded.sample([0, 1, 2, 2, 2], kind=SamplerKind.LOGPROBS, logits=logits)
    expected, expected_table = batch.sample(kind=SamplerKind.LOGPROBS)
    assert torch.equal(results.token_ids[:2], expected.token_ids)
    assert torch.equal(results.logprobs[:2], expected.logprobs)
    assert torch.equal(token_table[:2], expected_table)


@pytest.mark.parametrize("kind", list(SamplerKind))
def test_broken_rows_give_the_specifications_tokens(kind: SamplerKind) -> None:
    vocab_size = 515
    params = [SamplingParams(temperature=0.0)] * 4
    if kind is not SamplerKind.GREEDY:
        params += [SamplingParams(temperature=3.0, top_p=0.9), SamplingParams(repetition_penalty=1.3)] * 2
    params = params * 2
    batch = _Batch(params, vocab_size)
    logits = batch.logits
    for row, breaking in enumerate([0, 1, 2, 3] * (len(params) // 4)):
        if breaking == 0:
            logits[row, ::2] = float("nan")
        elif breaking == 1:
            logits[row] = float("nan") if row % 2 else -_INFINITY
        elif breaking == 2:
            logits[row, [200, 210]] = _INFINITY
        else:
            logits[row] *= 3e37
    before = logits.clone()
    slots = list(range(len(params)))
    expected = batch.expected(slots, logits, None)
    results, _ = batch.sample(kind=kind)
    assert results.token_ids.tolist() == expected.token_ids.tolist()
    if kind is SamplerKind.LOGPROBS:
        assert expected.logprobs is not None
        torch.testing.assert_close(results.logprobs, expected.logprobs, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)


def test_a_sealed_arena_serves_every_step_that_is_no_larger() -> None:
    batch = _Batch([SamplingParams(logprobs=2)] * 3, 515)
    masks = torch.full((3, 17), -1, dtype=torch.int32)
    batch.sample(kind=SamplerKind.LOGPROBS, masks=masks)
    batch.arena.seal()
    num_bytes = batch.arena.num_bytes
    for kind in SamplerKind:
        batch.sample([1, 2], kind=kind)
    assert batch.arena.num_bytes == num_bytes
    with pytest.raises(AssertionError, match="sampler_"):
        batch.sample([0, 1, 2, 2])


_SMALL = [1.0, 0.2, -0.5, 2.0, 0.0, 1.4, -2.0, 1.1]
_PROMPT, _OUTPUT = (3, 0, 3, 6, 3), (5, 5, 0, 5, 2, 2)
_CASES: list[tuple[SamplingParams, tuple[str, ...]]] = [
    (SamplingParams(temperature=0.3), ("ignores temperature",)),
    (
        SamplingParams(temperature=3.0, top_k=3, top_p=0.6),
        ("top_k keeps one more", "top_p of the whole vocabulary", "top_p drops the crossing token"),
    ),
    (SamplingParams(temperature=4.0, min_p=0.8), ("min_p of the whole", "filters before temperature")),
    (SamplingParams(repetition_penalty=20.0), ("repetition ignores prompt",)),
    (SamplingParams(presence_penalty=0.5, frequency_penalty=-1.0), ("counts prompt", "frequency once")),
    (
        SamplingParams(logit_bias={2: 3.0, 3: 4.0}, min_tokens=7, stop_token_ids=(3,), temperature=3.0),
        ("min_tokens off by one", "bias after temperature"),
    ),
]
_NUM_DRAWS = 4000 if DEVICE.type == "cuda" else 50


def test_draws_follow_the_exact_distribution_and_no_mutants() -> None:
    num_cases = len(_CASES)
    params = [case for case, _ in _CASES for _ in range(_NUM_DRAWS)]
    batch = _Batch(params, len(_SMALL))
    batch.tables.ints[:, 2] = len(_PROMPT)
    history = torch.tensor(_PROMPT + _OUTPUT, dtype=torch.int32)
    batch.token_table[:, : history.numel()] = history
    batch.lengths[:] = history.numel()
    tokens = batch.sample(logits=torch.tensor(_SMALL).repeat(len(params), 1))[0].token_ids
    for (case, mutants), drawn in zip(_CASES, tokens.view(num_cases, _NUM_DRAWS), strict=True):
        exact = exact_probabilities(_SMALL, case, prompt=_PROMPT, output=_OUTPUT)
        assert p_value(drawn, exact) > 1e-4
        for mutant in mutants:
            wrong = exact_probabilities(_SMALL, case, prompt=_PROMPT, output=_OUTPUT, mutant=mutant)
            assert p_value(drawn, wrong) < 1e-4, mutant
