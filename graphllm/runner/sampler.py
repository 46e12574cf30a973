"""Sampling of one step: per-slot parameters on the device, and what is done with them in which order.

Owns the parameter tables and the order of the sampler's operations, composed of references: the
specification, and what a CPU runs. `device_sampler.py` does the same in kernels. The mathematics of each
operation is in `kernels/`; who is sampled, and where the tokens go, is the runner's business.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from graphllm.errors import InvalidRequestError
from graphllm.kernels.argmax import argmax_ref
from graphllm.kernels.grammar_bitmask import apply_bitmask_ref
from graphllm.kernels.logit_bias import apply_logit_bias_ref
from graphllm.kernels.logprobs import logprobs_ref
from graphllm.kernels.min_tokens import mask_early_stops_ref
from graphllm.kernels.penalties import Penalties, apply_penalties_ref
from graphllm.kernels.random_draws import DrawKeys
from graphllm.kernels.sampled_rows import NUM_FLOATS, NUM_INTS, FloatColumn, IntColumn
from graphllm.kernels.sampling import sample_tokens_ref
from graphllm.kernels.token_filters import TokenFilters
from graphllm.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, SamplingParams

MAX_EOS_TOKEN_IDS = 16
MAX_STOP_IDS = MAX_STOP_TOKEN_IDS + MAX_EOS_TOKEN_IDS
# Positive parameters stay normal float32 numbers, so that neither x / t nor -inf * t is ever NaN.
_SMALLEST = torch.finfo(torch.float32).tiny
_INFINITY = float("inf")


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One sequence's parameters as they lie in the tables, in plain numbers for the staging to copy.

    floats: 6, ints: 6. bias_ids, bias_values: num_biases each. stop_ids: the whole row of 80, -1 after
    the last id. bias_ids, bias_values are None without biases, and stop_ids without min_tokens: nothing
    then reads the slot's old rows.
    """

    floats: tuple[float, ...]
    ints: tuple[int, ...]
    bias_ids: tuple[int, ...] | None
    bias_values: tuple[float, ...] | None
    stop_ids: tuple[int, ...] | None


def pack_sampling_row(
    params: SamplingParams,
    *,
    seed: int,
    sibling: int,
    num_prompt_tokens: int,
    eos_token_ids: Collection[int],
    applies_min_tokens: bool = True,
) -> SamplingRow:
    """A sequence's row of the sampling tables.

    seed: any integer, of which 64 bits count. sibling: the sequence's index in its request.
    eos_token_ids: the tokens that min_tokens holds back beside the request's stop_token_ids.
    applies_min_tokens: the sampler does that; else whoever makes the sequence's masks does.

    Raises InvalidRequestError when these are more than the tables hold.
    """
    floats = [0.0] * NUM_FLOATS
    floats[FloatColumn.TEMPERATURE] = max(params.temperature, _SMALLEST) if params.temperature else 0.0
    floats[FloatColumn.TOP_P] = params.top_p
    floats[FloatColumn.MIN_P] = params.min_p
    floats[FloatColumn.REPETITION_PENALTY] = max(params.repetition_penalty, _SMALLEST)
    floats[FloatColumn.PRESENCE_PENALTY] = params.presence_penalty
    floats[FloatColumn.FREQUENCY_PENALTY] = params.frequency_penalty
    biases = params.logit_bias or {}
    min_tokens = params.min_tokens if applies_min_tokens else 0
    ints = [0] * NUM_INTS
    ints[IntColumn.SEED] = (seed + 2**63) % 2**64 - 2**63
    ints[IntColumn.SIBLING] = sibling
    ints[IntColumn.NUM_PROMPT_TOKENS] = num_prompt_tokens
    ints[IntColumn.TOP_K] = min(params.top_k, 2**31)
    ints[IntColumn.MIN_TOKENS] = min(min_tokens, 2**31)
    ints[IntColumn.NUM_BIASES] = len(biases)
    return SamplingRow(
        floats=tuple(floats),
        ints=tuple(ints),
        bias_ids=tuple(biases) if biases else None,
        bias_values=tuple(biases.values()) if biases else None,
        stop_ids=_pack_stop_ids(params, eos_token_ids) if min_tokens else None,
    )


def _pack_stop_ids(params: SamplingParams, eos_token_ids: Collection[int]) -> tuple[int, ...]:
    ids = sorted({*params.stop_token_ids, *eos_token_ids})
    if len(ids) > MAX_STOP_IDS:
        raise InvalidRequestError(
            f"min_tokens holds back at most {MAX_STOP_IDS} stop tokens, the model's included; "
            f"here are {len(ids)}.",
            param="stop_token_ids",
        )
    return (*ids, *[-1] * (MAX_STOP_IDS - len(ids)))


@dataclass(frozen=True, slots=True)
class SamplingTables:
    """Each slot's sampling parameters, on the device.

    floats [num_slots, 6] float32, ints [num_slots, 6] int64, bias_ids [num_slots, 512] int32 and
    bias_values [num_slots, 512] float32 (the first ints[NUM_BIASES] count), stop_ids
    [num_slots, 80] int32 (-1: none).
    """

    floats: Tensor
    ints: Tensor
    bias_ids: Tensor
    bias_values: Tensor
    stop_ids: Tensor

    @classmethod
    def allocate(cls, num_slots: int, *, device: torch.device) -> SamplingTables:
        """Tables in which every slot is greedy and changes nothing."""
        neutral = pack_sampling_row(
            SamplingParams(temperature=0.0), seed=0, sibling=0, num_prompt_tokens=0, eos_token_ids=()
        )
        return cls(
            floats=torch.tensor([neutral.floats], dtype=torch.float32, device=device).repeat(num_slots, 1),
            ints=torch.tensor([neutral.ints], dtype=torch.int64, device=device).repeat(num_slots, 1),
            bias_ids=torch.zeros(num_slots, MAX_LOGIT_BIAS, dtype=torch.int32, device=device),
            bias_values=torch.zeros(num_slots, MAX_LOGIT_BIAS, dtype=torch.float32, device=device),
            stop_ids=torch.full((num_slots, MAX_STOP_IDS), -1, dtype=torch.int32, device=device),
        )

    def write_row(self, slot: int, row: SamplingRow) -> None:
        """Copy one row to its slot, from memory that is not pinned: for a device that shares ours."""
        self.floats[slot] = torch.tensor(row.floats, dtype=torch.float32)
        self.ints[slot] = torch.tensor(row.ints, dtype=torch.int64)
        if row.bias_ids is not None and row.bias_values is not None:
            ids = torch.tensor(row.bias_ids, dtype=torch.int32)
            self.bias_ids[slot, : ids.numel()] = ids
            self.bias_values[slot, : ids.numel()] = torch.tensor(row.bias_values, dtype=torch.float32)
        if row.stop_ids is not None:
            self.stop_ids[slot] = torch.tensor(row.stop_ids, dtype=torch.int32)

    def write_rows(
        self,
        slots: Tensor,
        *,
        floats: Tensor | None = None,
        ints: Tensor | None = None,
        bias_ids: Tensor | None = None,
        bias_values: Tensor | None = None,
        stop_ids: Tensor | None = None,
    ) -> None:
        """Scatter rows to their slots, one kernel for each table that is given, in the current stream.

        All are on the device: slots [n] int64, without repetition; the others have n rows of their
        table's whole width and dtype.
        """
        for table, rows in (
            (self.floats, floats),
            (self.ints, ints),
            (self.bias_ids, bias_ids),
            (self.bias_values, bias_values),
            (self.stop_ids, stop_ids),
        ):
            if rows is not None:
                table.index_copy_(0, slots, rows)


class SamplerKind(Enum):
    """Which of the device's samplers a step needs; each can do what those before it do.

    GREEDY: every row takes the largest of the model's logits. GENERAL: every parameter, and masks.
    LOGPROBS: also the logprobs of what was sampled and of the best alternatives.
    """

    GREEDY = "greedy"
    GENERAL = "general"
    LOGPROBS = "logprobs"


@dataclass(frozen=True, slots=True)
class SamplerVariant:
    """Which operations a step's rows need between them. A row that needs less is not changed by more.

    penalties: any. bias: any logit_bias or min_tokens. random: any that is not greedy.
    filters: any top_k, top_p or min_p that matters. num_logprobs: the most alternatives that a row
    reports, None if no row wants logprobs.
    """

    penalties: bool
    bias: bool
    random: bool
    filters: bool
    num_logprobs: int | None

    @classmethod
    def of(cls, params_list: Iterable[SamplingParams]) -> SamplerVariant:
        """The variant for rows with these parameters."""
        penalties = bias = random = filters = False
        num_logprobs: int | None = None
        for params in params_list:
            penalties |= params.has_penalties
            bias |= bool(params.logit_bias) or params.min_tokens > 0
            if not params.is_greedy:
                random = True
                filters |= params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
            if params.logprobs is not None:
                num_logprobs = max(params.logprobs, num_logprobs or 0)
        return cls(penalties, bias, random, filters, num_logprobs)

    @property
    def kind(self) -> SamplerKind:
        """The least of the device's samplers that these rows can use, as long as no row has a mask."""
        if self.num_logprobs is not None:
            return SamplerKind.LOGPROBS
        if self.penalties or self.bias or self.random:
            return SamplerKind.GENERAL
        return SamplerKind.GREEDY


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """What was sampled: token_ids [num_pairs] int64; logprobs [num_pairs] float32, top_ids
    [num_pairs, k] int64 and top_logprobs [num_pairs, k] float32 (most likely first), None where the
    variant has no logprobs. k is the variant's num_logprobs, or the vocabulary if that is smaller.

    Logprobs are those of the model, before any parameter is applied. -inf is a token that the
    model rules out.
    """

    token_ids: Tensor
    logprobs: Tensor | None
    top_ids: Tensor | None
    top_logprobs: Tensor | None


@dataclass(frozen=True, slots=True)
class _SlotParams:
    """The table rows of a step's pairs: floats [6, num_pairs], ints [6, num_pairs]."""

    floats: Tensor
    ints: Tensor

    @classmethod
    def gather(cls, tables: SamplingTables, slots: Tensor) -> _SlotParams:
        return cls(tables.floats[slots].t().contiguous(), tables.ints[slots].t().contiguous())


def sample(
    logits: Tensor,
    *,
    slots: Tensor,
    tables: SamplingTables,
    variant: SamplerVariant,
    token_table: Tensor,
    lengths: Tensor,
    mask: Tensor | None = None,
) -> SampledTokens:
    """Sample one token for each (logits row, slot) pair.

    logits: [num_pairs, vocab] float32, left as it is. slots: [num_pairs] int64. token_table:
    [num_slots, max_len] int32 or int64, prompt and output of each slot; lengths: [num_slots] int64,
    how many of them there are, which is also the position of the token now sampled. mask:
    [num_pairs, ceil(vocab / 32)] int32, a set bit allows a token, None allows all.

    NaN counts as -inf and +inf as the largest number. A row in which the parameters leave nothing
    above -inf takes the best of the model's own logits, and token 0 if there is none; no row's
    trouble touches another.
    """
    # A copy of our own: what follows changes it in place.
    changed = _without_nan(logits.contiguous())
    params = _SlotParams.gather(tables, slots)
    lengths = lengths[slots]  # [num_pairs] int64
    reported = None if variant.num_logprobs is None else logprobs_ref(changed, variant.num_logprobs)

    last_resort: Tensor | None = None
    if variant.penalties or variant.bias or mask is not None:
        last_resort = argmax_ref(changed)
        _apply_params(
            changed,
            params,
            slots=slots,
            tables=tables,
            variant=variant,
            token_table=token_table,
            lengths=lengths,
        )
        if mask is not None:
            apply_bitmask_ref(changed, mask)
        last_resort = torch.where(changed.amax(1) > -_INFINITY, -1, last_resort)
    token_ids = _choose(changed, params, variant=variant, positions=lengths)
    if last_resort is not None:
        token_ids = torch.where(last_resort < 0, token_ids, last_resort)

    if reported is None:
        return SampledTokens(token_ids, None, None, None)
    logprobs = reported.of(_without_nan(logits.gather(1, token_ids[:, None])))[:, 0]
    return SampledTokens(token_ids, logprobs, reported.top_ids, reported.top_logprobs)


def _without_nan(logits: Tensor) -> Tensor:
    """A copy in which NaN is -inf and +inf the largest number."""
    return logits.nan_to_num(nan=-_INFINITY, posinf=torch.finfo(torch.float32).max, neginf=-_INFINITY)


def _apply_params(
    logits: Tensor,
    params: _SlotParams,
    *,
    slots: Tensor,
    tables: SamplingTables,
    variant: SamplerVariant,
    token_table: Tensor,
    lengths: Tensor,
) -> None:
    """Penalties, then logit_bias, then min_tokens, on `logits` in place. lengths: [num_pairs]."""
    prompt_lengths = params.ints[IntColumn.NUM_PROMPT_TOKENS]
    if variant.penalties:
        penalties = Penalties(
            repetition=params.floats[FloatColumn.REPETITION_PENALTY],
            presence=params.floats[FloatColumn.PRESENCE_PENALTY],
            frequency=params.floats[FloatColumn.FREQUENCY_PENALTY],
        )
        apply_penalties_ref(
            logits,
            penalties,
            token_table=token_table,
            slots=slots,
            lengths=lengths,
            prompt_lengths=prompt_lengths,
        )
    if variant.bias:
        apply_logit_bias_ref(
            logits,
            tables.bias_ids[slots],
            tables.bias_values[slots],
            num_biases=params.ints[IntColumn.NUM_BIASES],
        )
        mask_early_stops_ref(
            logits,
            tables.stop_ids[slots],
            output_lengths=lengths - prompt_lengths,
            min_tokens=params.ints[IntColumn.MIN_TOKENS],
        )


def _choose(logits: Tensor, params: _SlotParams, *, variant: SamplerVariant, positions: Tensor) -> Tensor:
    """The tokens of logits that are as the requests want them: [num_pairs] int64."""
    if not variant.random:
        return argmax_ref(logits)
    filters = None
    if variant.filters:
        filters = TokenFilters(
            top_k=params.ints[IntColumn.TOP_K],
            top_p=params.floats[FloatColumn.TOP_P],
            min_p=params.floats[FloatColumn.MIN_P],
        )
    keys = DrawKeys(params.ints[IntColumn.SEED], params.ints[IntColumn.SIBLING], positions)
    return sample_tokens_ref(logits, params.floats[FloatColumn.TEMPERATURE], keys=keys, filters=filters)
