"""The sampler's tables and variants, invariance to the batch, logprobs, and rows that are broken."""

from collections.abc import Sequence

import pytest
import torch

from graphllm.errors import InvalidRequestError
from graphllm.runner.sampler import (
    MAX_STOP_IDS,
    SampledTokens,
    SamplerKind,
    SamplerVariant,
    SamplingTables,
    pack_sampling_row,
    sample,
)
from graphllm.sampling_params import MAX_LOGIT_BIAS, SamplingParams

_VOCAB = 300
_EOS = (5, 6)
_INFINITY = float("inf")
_GREEDY = SamplingParams(temperature=0.0)

_MIXED = [
    _GREEDY,
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=10),
    SamplingParams(top_p=0.8, repetition_penalty=1.4),
    SamplingParams(temperature=0.0, presence_penalty=1.0, frequency_penalty=0.5),
    SamplingParams(min_p=0.2, logit_bias={3: 4.0, 250: -100.0}),
    SamplingParams(temperature=0.0, logit_bias={7: 100.0}),
    SamplingParams(min_tokens=30, stop_token_ids=(1, 2)),
    SamplingParams(top_k=200, top_p=0.99, min_p=0.001, logprobs=3),
    SamplingParams(temperature=2.0, logprobs=0),
    SamplingParams(temperature=0.0, min_tokens=3, repetition_penalty=0.8, logprobs=5),
    SamplingParams(top_p=0.1),
]


class _Batch:
    """Slots with parameters and token histories; every slot's seed is its number."""

    def __init__(self, params_list: Sequence[SamplingParams], *, vocab_size: int = _VOCAB) -> None:
        num_slots = len(params_list)
        generator = torch.Generator().manual_seed(1)
        self.params = list(params_list)
        self.tables = SamplingTables.allocate(num_slots, device=torch.device("cpu"))
        for slot, params in enumerate(params_list):
            self.write(slot, params)
        self.token_table = torch.randint(0, vocab_size, (num_slots, 60), generator=generator).int()
        self.lengths = torch.randint(25, 60, (num_slots,), generator=generator)
        self.logits = 3 * torch.randn(num_slots, vocab_size, generator=generator)

    def write(self, slot: int, params: SamplingParams) -> None:
        row = pack_sampling_row(params, seed=slot, sibling=slot % 3, num_prompt_tokens=20, eos_token_ids=_EOS)
        self.tables.write_row(slot, row)

    def sample(
        self,
        slots: Sequence[int] | None = None,
        *,
        logits: torch.Tensor | None = None,
        variant: SamplerVariant | None = None,
        mask: torch.Tensor | None = None,
    ) -> SampledTokens:
        chosen = list(range(len(self.params))) if slots is None else list(slots)
        return sample(
            self.logits[chosen] if logits is None else logits,
            slots=torch.tensor(chosen, dtype=torch.int64),
            tables=self.tables,
            variant=variant or SamplerVariant.of(self.params[slot] for slot in chosen),
            token_table=self.token_table,
            lengths=self.lengths,
            mask=mask,
        )


def test_every_row_of_a_mixed_batch_gets_what_it_gets_alone() -> None:
    batch = _Batch(_MIXED)
    together = batch.sample()
    assert together.logprobs is not None
    for slot in range(len(_MIXED)):
        alone = batch.sample([slot])
        assert int(alone.token_ids) == int(together.token_ids[slot])
        if alone.logprobs is not None:
            torch.testing.assert_close(alone.logprobs[0], together.logprobs[slot], rtol=0, atol=1e-5)


def test_rows_may_come_in_any_order_and_one_row_of_logits_may_feed_many_slots() -> None:
    batch = _Batch(_MIXED)
    expected = batch.sample().token_ids
    order = torch.randperm(len(_MIXED), generator=torch.Generator().manual_seed(3)).tolist()
    assert torch.equal(batch.sample(order).token_ids, expected[order])

    siblings = _Batch([SamplingParams()] * 40)
    siblings.lengths.fill_(30)
    shared = siblings.logits[:1].expand(40, -1)
    assert siblings.sample(logits=shared).token_ids.unique().numel() > 5


def test_same_seed_sibling_and_position_give_the_same_token_in_any_slot() -> None:
    batch = _Batch([SamplingParams()] * 3)
    for slot in range(3):
        row = pack_sampling_row(
            SamplingParams(), seed=123, sibling=0, num_prompt_tokens=20, eos_token_ids=_EOS
        )
        batch.tables.write_row(slot, row)
    flat = torch.zeros(3, _VOCAB)
    batch.lengths[:] = torch.tensor([40, 40, 41])
    first, second, later = batch.sample(logits=flat).token_ids.tolist()
    assert first == second != later


def test_logits_are_left_as_they_were() -> None:
    batch = _Batch(_MIXED)
    batch.logits[0, 3] = float("nan")
    before = batch.logits.clone()
    logits = batch.logits[:]
    mask = torch.zeros(len(_MIXED), -(-_VOCAB // 32), dtype=torch.int32)
    batch.sample(logits=logits, mask=mask)
    torch.testing.assert_close(batch.logits, before, rtol=0, atol=0, equal_nan=True)


def test_strided_logits_are_sampled_like_contiguous_ones() -> None:
    batch = _Batch(_MIXED)
    expected = batch.sample().token_ids
    assert torch.equal(batch.sample(logits=batch.logits.t().contiguous().t()).token_ids, expected)


def test_logprobs_are_those_of_the_raw_logits_whatever_the_parameters() -> None:
    params = [
        SamplingParams(temperature=0.3, top_k=4, logprobs=4, logit_bias={9: 50.0}),
        SamplingParams(temperature=0.0, repetition_penalty=3.0, logprobs=2),
        SamplingParams(logprobs=0),
    ]
    batch = _Batch(params)
    found = batch.sample()
    assert found.logprobs is not None and found.top_ids is not None and found.top_logprobs is not None
    expected = batch.logits.log_softmax(1)
    torch.testing.assert_close(
        found.logprobs, expected.gather(1, found.token_ids[:, None])[:, 0], rtol=1e-6, atol=1e-5
    )
    top = expected.topk(4, dim=1)
    assert torch.equal(found.top_ids, top.indices)
    torch.testing.assert_close(found.top_logprobs, top.values, rtol=1e-6, atol=1e-5)
    assert int(found.token_ids[0]) == 9  # the bias decided, and the logprob does not know of it


def test_no_pairs_give_no_tokens() -> None:
    found = _Batch(_MIXED).sample([], variant=SamplerVariant.of(_MIXED))
    assert found.token_ids.shape == (0,)
    assert found.top_logprobs is not None and found.top_logprobs.shape == (0, 5)


def test_no_logprobs_are_computed_when_none_are_asked_for() -> None:
    found = _Batch([_GREEDY, SamplingParams()]).sample()
    assert found.logprobs is None and found.top_ids is None and found.top_logprobs is None


def test_more_logprobs_than_tokens_give_all_tokens() -> None:
    found = _Batch([SamplingParams(logprobs=20)], vocab_size=8).sample()
    assert found.top_ids is not None and sorted(found.top_ids[0].tolist()) == list(range(8))


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-300])
def test_tiny_temperature_is_greedy_without_overflow(temperature: float) -> None:
    batch = _Batch([SamplingParams(temperature=temperature, top_p=0.9)] * 4)
    batch.logits[1] *= 1e30
    batch.logits[2] = -1e30
    batch.logits[2, 17] = -9e29
    assert torch.equal(batch.sample().token_ids, batch.logits.argmax(1))


def test_equal_logits_give_the_lowest_id_to_the_greedy() -> None:
    batch = _Batch([_GREEDY] * 2)
    logits = torch.zeros(2, _VOCAB)
    logits[1, [40, 90, 299]] = 1.0
    assert batch.sample(logits=logits).token_ids.tolist() == [0, 40]


def _broken_rows() -> dict[str, tuple[torch.Tensor, int | None]]:
    """Rows of logits with something wrong, and the token that they must give to the greedy."""
    row = torch.randn(_VOCAB, generator=torch.Generator().manual_seed(8))
    row[50] = 9.0
    nan, one_nan = torch.full_like(row, float("nan")), row.clone()
    one_nan[[3, 77]] = float("nan")
    one_left, positive, negative = nan.clone(), row.clone(), torch.full_like(row, -_INFINITY)
    one_left[123] = -40.0
    positive[[200, 210]] = _INFINITY
    one_nan_among_infinities = negative.clone()
    one_nan_among_infinities[4] = float("nan")
    return {
        "some NaN": (one_nan, 50),
        "all NaN": (nan, 0),
        "all but one NaN": (one_left, 123),
        "all -inf": (negative, 0),
        "NaN and -inf": (one_nan_among_infinities, 0),
        "+inf": (positive, 200),
        "huge": (row * 3e37, 50),
    }


@pytest.mark.parametrize("name", _broken_rows())
def test_broken_row_gives_a_defined_token_and_harms_no_other(name: str) -> None:
    broken, greedy_token = _broken_rows()[name]
    batch = _Batch(_MIXED)
    mask = torch.full((len(_MIXED), -(-_VOCAB // 32)), -1, dtype=torch.int32)
    expected = batch.sample(mask=mask)
    assert expected.logprobs is not None
    for slot in range(len(_MIXED)):
        logits = batch.logits.clone()
        logits[slot] = broken
        found = batch.sample(logits=logits, mask=mask)
        others = [other for other in range(len(_MIXED)) if other != slot]
        assert torch.equal(found.token_ids[others], expected.token_ids[others])
        assert found.logprobs is not None and torch.equal(found.logprobs[others], expected.logprobs[others])
        assert 0 <= int(found.token_ids[slot]) < _VOCAB
        assert not found.logprobs.isnan().any()
        if slot == 0:
            assert int(found.token_ids[slot]) == greedy_token


def test_nan_and_minus_infinity_are_never_drawn() -> None:
    batch = _Batch([SamplingParams(temperature=5.0)] * 64)
    logits = torch.full((64, _VOCAB), float("nan"))
    logits[:, ::2] = -_INFINITY
    logits[:, [10, 11]] = 0.0
    assert set(batch.sample(logits=logits).token_ids.tolist()) == {10, 11}


def test_row_whose_grammar_allows_nothing_takes_the_models_best_token() -> None:
    params = [_GREEDY, SamplingParams(), SamplingParams(top_p=0.5, logit_bias={4: 100.0})]
    batch = _Batch(params)
    mask = torch.zeros(3, -(-_VOCAB // 32), dtype=torch.int32)
    assert torch.equal(batch.sample(mask=mask).token_ids, batch.logits.argmax(1))


def test_only_tokens_of_the_mask_are_sampled() -> None:
    batch = _Batch(_MIXED)
    mask = torch.zeros(len(_MIXED), -(-_VOCAB // 32), dtype=torch.int32)
    mask[:, 2] = 0b1010  # tokens 65 and 67
    mask[3] = -1
    unmasked = batch.sample().token_ids
    masked = batch.sample(mask=mask).token_ids
    assert masked[3] == unmasked[3]
    others = [slot for slot in range(len(_MIXED)) if slot != 3]
    assert set(masked[others].tolist()) <= {65, 67}


def test_early_stop_tokens_wait_for_the_minimum_length() -> None:
    params = SamplingParams(temperature=0.0, min_tokens=4, stop_token_ids=(9,))
    batch = _Batch([params] * 2)
    batch.lengths[:] = torch.tensor([23, 24])  # 3 and 4 output tokens
    logits = torch.zeros(2, _VOCAB)
    logits[:, [5, 6, 9]] = torch.tensor([8.0, 9.0, 7.0])
    logits[:, 11] = 1.0
    assert batch.sample(logits=logits).token_ids.tolist() == [11, 6]


def test_slot_forgets_the_parameters_of_its_last_owner() -> None:
    heavy = SamplingParams(
        top_k=3,
        repetition_penalty=2.0,
        min_tokens=50,
        logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS), 50.0),
    )
    batch = _Batch([heavy, _GREEDY], vocab_size=600)
    batch.write(0, SamplingParams(temperature=0.0, logit_bias={3: -1.0}))
    variant = SamplerVariant.of([heavy])
    logits = batch.logits.clone()
    logits[0, 3], logits[0, 5] = 21.5, 20.0  # token 5 ends the text; 3 is the best by more than its bias
    assert int(batch.sample(logits=logits, variant=variant).token_ids[0]) == 3
    logits[0, 5] = 21.0
    assert int(batch.sample(logits=logits, variant=variant).token_ids[0]) == 5


def test_full_bias_row_reaches_every_token_it_names() -> None:
    bias = dict.fromkeys(range(MAX_LOGIT_BIAS), -100.0)
    batch = _Batch([SamplingParams(logit_bias=bias)] * 20, vocab_size=MAX_LOGIT_BIAS + 5)
    assert int(batch.sample().token_ids.min()) >= MAX_LOGIT_BIAS


def test_fresh_tables_are_greedy() -> None:
    batch = _Batch([_GREEDY] * 4)
    batch.tables = SamplingTables.allocate(4, device=torch.device("cpu"))
    general = SamplerVariant(penalties=True, bias=True, random=True, filters=True, num_logprobs=None)
    assert torch.equal(batch.sample(variant=general).token_ids, batch.logits.argmax(1))


def test_seed_counts_modulo_two_to_the_64() -> None:
    def ints(seed: int) -> list[int]:
        row = pack_sampling_row(_GREEDY, seed=seed, sibling=0, num_prompt_tokens=0, eos_token_ids=())
        return list(row.ints)

    assert ints(-1) == ints(2**64 - 1)
    assert ints(-(2**63)) == ints(2**63)
    assert ints(2**63 - 1) != ints(-(2**63))


def test_row_without_biases_copies_none() -> None:
    row = pack_sampling_row(SamplingParams(), seed=0, sibling=0, num_prompt_tokens=0, eos_token_ids=_EOS)
    assert row.bias_ids is None and row.bias_values is None and row.stop_ids is None


def test_more_stop_tokens_than_the_table_holds_are_refused() -> None:
    params = SamplingParams(min_tokens=1, stop_token_ids=tuple(range(64)))
    pack_sampling_row(params, seed=0, sibling=0, num_prompt_tokens=0, eos_token_ids=range(100, 116))
    with pytest.raises(InvalidRequestError, match="at most 80 stop tokens") as caught:
        pack_sampling_row(params, seed=0, sibling=0, num_prompt_tokens=0, eos_token_ids=range(100, 117))
    assert caught.value.param == "stop_token_ids"


@pytest.mark.parametrize(
    ("params_list", "expected"),
    [
        ([], SamplerVariant(False, False, False, False, None)),
        (
            [SamplingParams(temperature=0.0, top_k=5, top_p=0.5)],
            SamplerVariant(False, False, False, False, None),
        ),
        ([_GREEDY, SamplingParams()], SamplerVariant(False, False, True, False, None)),
        ([SamplingParams(min_p=0.1)], SamplerVariant(False, False, True, True, None)),
        (
            [SamplingParams(temperature=0.0, presence_penalty=0.1)],
            SamplerVariant(True, False, False, False, None),
        ),
        ([SamplingParams(temperature=0.0, min_tokens=1)], SamplerVariant(False, True, False, False, None)),
        ([SamplingParams(temperature=0.0, logit_bias={})], SamplerVariant(False, False, False, False, None)),
        (
            [
                SamplingParams(temperature=0.0, logprobs=0),
                SamplingParams(temperature=0.0, logprobs=7),
                _GREEDY,
            ],
            SamplerVariant(False, False, False, False, 7),
        ),
    ],
)
def test_variant_names_what_the_rows_need(
    params_list: list[SamplingParams], expected: SamplerVariant
) -> None:
    assert SamplerVariant.of(params_list) == expected
    assert hash(SamplerVariant.of(params_list)) == hash(expected)


@pytest.mark.parametrize(
    ("params", "kind"),
    [
        (SamplingParams(temperature=0.0, top_k=5, logit_bias={}), SamplerKind.GREEDY),
        (SamplingParams(), SamplerKind.GENERAL),
        (SamplingParams(temperature=0.0, frequency_penalty=0.1), SamplerKind.GENERAL),
        (SamplingParams(temperature=0.0, min_tokens=1), SamplerKind.GENERAL),
        (SamplingParams(temperature=0.0, logit_bias={3: 1.0}), SamplerKind.GENERAL),
        (SamplingParams(temperature=0.0, logprobs=0), SamplerKind.LOGPROBS),
        (SamplingParams(top_p=0.5, logprobs=3), SamplerKind.LOGPROBS),
    ],
)
def test_kind_is_the_least_sampler_that_serves_all_rows(params: SamplingParams, kind: SamplerKind) -> None:
    assert SamplerVariant.of([_GREEDY, params]).kind is kind


def test_rows_scattered_together_equal_rows_written_one_by_one() -> None:
    rows = [
        pack_sampling_row(params, seed=-slot, sibling=slot, num_prompt_tokens=7, eos_token_ids=_EOS)
        for slot, params in enumerate(_MIXED)
    ]
    expected = _Batch(_MIXED).tables
    slots = torch.randperm(len(rows), generator=torch.Generator().manual_seed(4))
    found = SamplingTables.allocate(len(rows), device=torch.device("cpu"))
    for slot, row in zip(slots.tolist(), rows, strict=True):
        expected.write_row(slot, row)
    found.write_rows(
        slots,
        floats=torch.tensor([row.floats for row in rows]),
        ints=torch.tensor([row.ints for row in rows]),
    )
    assert torch.equal(found.floats, expected.floats) and torch.equal(found.ints, expected.ints)

    late = [index for index, row in enumerate(rows) if row.stop_ids is not None]
    stop_ids = torch.tensor([rows[index].stop_ids for index in late], dtype=torch.int32)
    found.write_rows(slots[late], stop_ids=stop_ids)
    assert torch.equal(found.stop_ids[slots[late]], expected.stop_ids[slots[late]])
    biased = [index for index, row in enumerate(rows) if row.bias_ids is not None]
    bias_ids = torch.zeros(len(biased), MAX_LOGIT_BIAS, dtype=torch.int32)
    bias_values = torch.zeros(len(biased), MAX_LOGIT_BIAS)
    for line, index in enumerate(biased):
        bias_ids[line, : len(rows[index].bias_ids or ())] = torch.tensor(rows[index].bias_ids)
        bias_values[line, : len(rows[index].bias_ids or ())] = torch.tensor(rows[index].bias_values)
    found.write_rows(slots[biased], bias_ids=bias_ids, bias_values=bias_values)
    for index in biased:
        slot, count = int(slots[index]), len(rows[index].bias_ids or ())
        assert torch.equal(found.bias_ids[slot, :count], expected.bias_ids[slot, :count])
        assert torch.equal(found.bias_values[slot, :count], expected.bias_values[slot, :count])
    assert len(late) == 2 and len(biased) == 2 and stop_ids.shape[1] == MAX_STOP_IDS
