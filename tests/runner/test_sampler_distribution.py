"""Sampled tokens follow the exact probabilities, and would betray the likely mistakes.

The expected probabilities are those of `exact_distribution.py`. Each case is tested twice: draws agree
with the exact distribution (chi-squared, p > 1e-4), and disagree (p < 1e-4) with that of every mutant
named beside it.
"""

import math
from dataclasses import dataclass

import pytest
import torch

from graphllm.runner.sampler import SamplerVariant, SamplingTables, pack_sampling_row, sample
from graphllm.sampling_params import SamplingParams
from tests.runner.exact_distribution import EOS, exact_probabilities, p_value

_THRESHOLD = 1e-4


def _draw(
    logits: list[float],
    params: SamplingParams,
    num_draws: int,
    *,
    prompt: tuple[int, ...] = (),
    output: tuple[int, ...] = (),
) -> torch.Tensor:
    """Draws for one row of logits: with a history each has its own seed, otherwise its own position."""
    tables = SamplingTables.allocate(num_draws, device=torch.device("cpu"))
    history = prompt + output
    for slot in range(num_draws if history else 1):
        row = pack_sampling_row(
            params, seed=slot, sibling=0, num_prompt_tokens=len(prompt), eos_token_ids=(EOS,)
        )
        tables.write_row(slot, row)
    lengths = torch.full((num_draws,), len(history))
    if not history:
        for table in (tables.floats, tables.ints, tables.bias_ids, tables.bias_values, tables.stop_ids):
            table.copy_(table[:1].expand_as(table))
        lengths = torch.arange(num_draws)
    return sample(
        torch.tensor(logits).expand(num_draws, -1),
        slots=torch.arange(num_draws),
        tables=tables,
        variant=SamplerVariant.of([params]),
        token_table=torch.tensor(history or (0,), dtype=torch.int32).expand(num_draws, -1),
        lengths=lengths,
    ).token_ids


_SMALL = [1.0, 0.2, -0.5, 2.0, 0.0, 1.4, -2.0, 1.1]
_MEDIUM = [2.0 * math.sin(1.7 * token) + 0.02 * token for token in range(50)]
_PROMPT = (3, 0, 3, 6, 3)
_OUTPUT = (5, 5, 0, 5, 2, 2)


@dataclass(frozen=True)
class _Case:
    params: SamplingParams
    mutants: tuple[str, ...]
    logits: tuple[float, ...] = tuple(_SMALL)
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()


_CASES = {
    "plain": _Case(SamplingParams(), ()),
    "plain of 50": _Case(SamplingParams(), (), tuple(_MEDIUM)),
    "cool": _Case(SamplingParams(temperature=0.6), ("ignores temperature",)),
    "hot": _Case(SamplingParams(temperature=1.8), ("ignores temperature",), tuple(_MEDIUM)),
    "top_k": _Case(SamplingParams(top_k=3), ("top_k keeps one more",)),
    "top_k of 50": _Case(
        SamplingParams(top_k=20, temperature=1.3), ("top_k keeps one more",), tuple(_MEDIUM)
    ),
    "top_p": _Case(
        SamplingParams(top_p=0.7, temperature=1.5),
        ("top_p drops the crossing token", "top_p keeps one more", "filters before temperature"),
    ),
    "top_p of 50": _Case(
        SamplingParams(top_p=0.9),
        ("top_p drops the crossing token", "top_p keeps one more"),
        tuple(_MEDIUM),
    ),
    "min_p": _Case(
        SamplingParams(min_p=0.2, temperature=1.4), ("min_p of the whole", "filters before temperature")
    ),
    "top_k, top_p": _Case(
        SamplingParams(top_k=4, top_p=0.82),
        ("top_k keeps one more", "top_p of the whole vocabulary", "top_p drops the crossing token"),
    ),
    "repetition": _Case(
        SamplingParams(repetition_penalty=1.6),
        ("repetition ignores prompt", "repetition always divides"),
        prompt=_PROMPT,
        output=_OUTPUT,
    ),
    "presence, frequency": _Case(
        SamplingParams(presence_penalty=0.4, frequency_penalty=0.3),
        ("counts prompt", "frequency once"),
        prompt=_PROMPT,
        output=_OUTPUT,
    ),
    "bias": _Case(SamplingParams(logit_bias={2: 2.5, 3: -1.0}, temperature=1.5), ("bias after temperature",)),
    "min_tokens": _Case(
        SamplingParams(min_tokens=7, stop_token_ids=(3,)),
        ("min_tokens off by one",),
        prompt=_PROMPT,
        output=_OUTPUT,
    ),
    "everything": _Case(
        SamplingParams(
            temperature=1.3,
            top_k=6,
            top_p=0.9,
            min_p=0.1,
            repetition_penalty=1.3,
            presence_penalty=0.3,
            frequency_penalty=-0.2,
            logit_bias={6: 3.0, 1: 0.5},
            min_tokens=7,
        ),
        (
            "ignores temperature",
            "top_p drops the crossing token",
            "top_p of the whole vocabulary",
            "repetition ignores prompt",
            "counts prompt",
            "bias after temperature",
            "min_tokens off by one",
        ),
        prompt=_PROMPT,
        output=_OUTPUT,
    ),
}


@pytest.mark.parametrize("name", _CASES)
def test_draws_follow_the_exact_distribution_and_no_mutants(name: str) -> None:
    case = _CASES[name]
    logits = list(case.logits)
    tokens = _draw(logits, case.params, 8000, prompt=case.prompt, output=case.output)

    def p_value_of(mutant: str) -> float:
        return p_value(
            tokens,
            exact_probabilities(logits, case.params, prompt=case.prompt, output=case.output, mutant=mutant),
        )

    assert p_value_of("") > _THRESHOLD
    undetected = [mutant for mutant in case.mutants if p_value_of(mutant) > _THRESHOLD]
    assert not undetected


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_draws_from_a_full_vocabulary_follow_the_exact_distribution(top_p: float) -> None:
    vocab_size = 49_152
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0))
    logits = (-1.5 * (order + 1.0).log()).tolist()  # Zipf's law over shuffled ids
    params = SamplingParams(top_p=top_p)
    tokens = _draw_in_parts(logits, params, num_parts=25, part_size=64)
    probabilities = exact_probabilities(logits, params)
    assert p_value(tokens, probabilities) > _THRESHOLD
    flatter = probabilities**0.75
    assert p_value(tokens, flatter / flatter.sum()) < _THRESHOLD


def _draw_in_parts(
    logits: list[float], params: SamplingParams, *, num_parts: int, part_size: int
) -> torch.Tensor:
    tables = SamplingTables.allocate(part_size, device=torch.device("cpu"))
    for slot in range(part_size):
        row = pack_sampling_row(params, seed=17, sibling=0, num_prompt_tokens=0, eos_token_ids=())
        tables.write_row(slot, row)
    rows = torch.tensor(logits).expand(part_size, -1).contiguous()
    parts = [
        sample(
            rows,
            slots=torch.arange(part_size),
            tables=tables,
            variant=SamplerVariant.of([params]),
            token_table=torch.zeros(part_size, 1, dtype=torch.int32),
            lengths=part * part_size + torch.arange(part_size),
        ).token_ids
        for part in range(num_parts)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("varied", ["seed", "sibling", "position"])
def test_draws_of_neighbouring_seeds_siblings_and_positions_are_independent(varied: str) -> None:
    num_draws, vocab_size = 8000, 8
    tables = SamplingTables.allocate(num_draws, device=torch.device("cpu"))
    for slot in range(num_draws):
        row = pack_sampling_row(
            SamplingParams(),
            seed=slot if varied == "seed" else 1,
            sibling=slot if varied == "sibling" else 0,
            num_prompt_tokens=0,
            eos_token_ids=(),
        )
        tables.write_row(slot, row)
    tokens = sample(
        torch.zeros(num_draws, vocab_size),
        slots=torch.arange(num_draws),
        tables=tables,
        variant=SamplerVariant.of([SamplingParams()]),
        token_table=torch.zeros(num_draws, 1, dtype=torch.int32),
        lengths=torch.arange(num_draws)
        if varied == "position"
        else torch.zeros(num_draws, dtype=torch.int64),
    ).token_ids
    pairs = tokens[0::2] * vocab_size + tokens[1::2]
    uniform = torch.full((vocab_size**2,), vocab_size**-2.0, dtype=torch.float64)
    assert p_value(pairs, uniform) > _THRESHOLD
