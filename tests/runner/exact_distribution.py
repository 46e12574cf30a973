"""Probabilities of the next token worked out by definition, with mutants; and a test of draws.

The expected probabilities are worked out token by token in float64, straight from the parameters'
definitions. A mutant is a likely mistake: `exact_probabilities` with its name gives what would be drawn.
"""

from __future__ import annotations

import math
from collections import Counter

import torch

from graphllm.sampling_params import SamplingParams

EOS = 7


def exact_probabilities(
    logits: list[float],
    params: SamplingParams,
    *,
    prompt: tuple[int, ...] = (),
    output: tuple[int, ...] = (),
    mutant: str = "",
) -> torch.Tensor:
    changed = _penalized(logits, params, prompt=prompt, output=output, mutant=mutant)
    temperature = 1.0 if mutant == "ignores temperature" else params.temperature
    bias = params.logit_bias or {}
    late_bias = {token: value for token, value in bias.items() if mutant == "bias after temperature"}
    for token, value in bias.items():
        changed[token] += 0.0 if late_bias else value
    min_tokens = params.min_tokens - (mutant == "min_tokens off by one")
    if len(output) < min_tokens:
        for token in {EOS, *params.stop_token_ids}:
            changed[token] = -math.inf
    scaled = [x / temperature + late_bias.get(token, 0.0) for token, x in enumerate(changed)]
    ranked_by = changed if mutant == "filters before temperature" else scaled
    kept = _kept(ranked_by, params, mutant=mutant)
    masses = torch.tensor(
        [math.exp(scaled[token]) if token in kept else 0.0 for token in range(len(logits))],
        dtype=torch.float64,
    )
    return masses / masses.sum()


def _penalized(
    logits: list[float],
    params: SamplingParams,
    *,
    prompt: tuple[int, ...],
    output: tuple[int, ...],
    mutant: str,
) -> list[float]:
    changed = list(logits)
    for token in set(output) if mutant == "repetition ignores prompt" else {*prompt, *output}:
        divides = logits[token] > 0 or mutant == "repetition always divides"
        penalty = params.repetition_penalty
        changed[token] = logits[token] / penalty if divides else logits[token] * penalty
    counts = Counter(prompt + output if mutant == "counts prompt" else output)
    for token, count in counts.items():
        frequency = count if mutant != "frequency once" else 1
        changed[token] -= params.frequency_penalty * frequency + params.presence_penalty
    return changed


def _kept(logits: list[float], params: SamplingParams, *, mutant: str) -> set[int]:
    maximum = max(logits)
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    masses = {token: math.exp(logits[token] - maximum) for token in order}
    whole = sum(masses.values())
    if params.top_k:
        order = order[: params.top_k + (mutant == "top_k keeps one more")]
    total = whole if mutant == "top_p of the whole vocabulary" else sum(masses[token] for token in order)
    kept, before = set(), 0.0
    for rank, token in enumerate(order):
        reached = before + masses[token] if mutant == "top_p drops the crossing token" else before
        if rank and reached / total >= params.top_p:
            if mutant == "top_p keeps one more":
                kept.add(token)
            break
        floor = params.min_p * whole if mutant == "min_p of the whole" else params.min_p
        if rank and masses[token] < floor:
            break
        kept.add(token)
        before += masses[token]
    return kept


def p_value(tokens: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's chi-squared test; tokens expected fewer than five times are counted together."""
    counts = torch.bincount(tokens, minlength=probabilities.numel()).double()
    if counts[probabilities == 0].sum() > 0:
        return 0.0
    expected = probabilities * tokens.numel()
    common = expected >= 5
    counts = torch.cat((counts[common], counts[~common].sum()[None]))
    expected = torch.cat((expected[common], expected[~common].sum()[None]))
    counts, expected = counts[expected > 1e-9], expected[expected > 1e-9]
    if counts.numel() == 1:
        return 1.0
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor(counts.numel() - 1.0, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees / 2, statistic / 2))
