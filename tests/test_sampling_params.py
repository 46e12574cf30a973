"""SamplingParams: what is accepted, what is normalized, and that a refusal names its field."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphllm.errors import InvalidRequestError
from graphllm.sampling_params import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORD_LENGTH,
    MAX_BAD_WORDS,
    MAX_BAD_WORDS_LENGTH,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_SEED,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)
from graphllm.structured_outputs import StructuredOutputs

NAN, INF, HUGE = float("nan"), float("inf"), 10**400

REFUSED: list[tuple[str, Any]] = [
    *[("n", value) for value in (0, -1, 129, 1.0, True, "1", None, HUGE)],
    *[("max_tokens", value) for value in (-1, 1.5, True, "5")],
    *[("min_tokens", value) for value in (-1, 0.5, False, None)],
    *[("temperature", value) for value in (-0.1, 100.1, NAN, INF, -INF, "1", True, None)],
    *[("top_k", value) for value in (-2, 1.0, True, None)],
    *[("top_p", value) for value in (0.0, -0.1, 1.0001, NAN, INF, "1", None)],
    *[("min_p", value) for value in (-0.1, 1.1, NAN, None)],
    *[("seed", value) for value in (2**63, -(2**63) - 1, 1.0, True, "1", HUGE)],
    *[("repetition_penalty", value) for value in (0.0, -1.0, 100.1, NAN, INF, None)],
    *[("presence_penalty", value) for value in (-2.1, 2.1, NAN, None)],
    *[("frequency_penalty", value) for value in (-2.1, 2.1, NAN, None)],
    *[("logprobs", value) for value in (-1, MAX_LOGPROBS + 1, 1.0, True, "all")],
    *[("prompt_logprobs", value) for value in (-1, MAX_LOGPROBS + 1, 1.0, True, "all")],
    *[("allowed_token_ids", value) for value in ([], [-1], [1.0], [True], ["1"], 5, "12")],
    ("allowed_token_ids", range(MAX_ALLOWED_TOKEN_IDS + 1)),
    ("allowed_token_ids", [0] * (MAX_ALLOWED_TOKEN_IDS + 1)),
    *[("bad_words", value) for value in ([""], [1], [None], 5, ["x" * (MAX_BAD_WORD_LENGTH + 1)])],
    ("bad_words", ["x"] * (MAX_BAD_WORDS + 1)),
    ("bad_words", ["x" * MAX_BAD_WORD_LENGTH] * (MAX_BAD_WORDS_LENGTH // MAX_BAD_WORD_LENGTH + 1)),
    *[("structured_outputs", value) for value in ({"regex": "a"}, "a", True)],
    *[("logit_bias", {1: value}) for value in (-100.1, 100.1, NAN, True, "1", None)],
    *[("logit_bias", {key: 1.0}) for key in (-1, "1", 1.0, True)],
    ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0)),
    ("stop", [""]),
    ("stop", [None]),
    ("stop", [b"x"]),
    ("stop", ["x"] * (MAX_STOP_STRINGS + 1)),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [1.0]),
    ("stop_token_ids", [True]),
    ("stop_token_ids", [1] * (MAX_STOP_TOKEN_IDS + 1)),
]

ACCEPTED: list[tuple[str, Any]] = [
    ("n", 128),
    ("max_tokens", None),
    ("max_tokens", 0),
    ("max_tokens", 1),
    ("max_tokens", HUGE),
    ("temperature", 0),
    ("temperature", 100),
    ("top_k", 10**9),
    ("top_p", 1),
    ("top_p", 1e-9),
    ("min_p", 0),
    ("min_p", 1),
    ("seed", None),
    ("seed", -MAX_SEED),
    ("seed", MAX_SEED - 1),
    ("repetition_penalty", 1e-3),
    ("presence_penalty", -2),
    ("frequency_penalty", 2.0),
    ("logprobs", None),
    ("logprobs", 0),
    ("logprobs", MAX_LOGPROBS),
    ("logit_bias", {0: -100, 5: 100.0}),
    ("logit_bias", {}),
    ("prompt_logprobs", 0),
    ("prompt_logprobs", MAX_LOGPROBS),
    ("allowed_token_ids", None),
    ("allowed_token_ids", tuple(range(MAX_ALLOWED_TOKEN_IDS))),
    ("bad_words", ("x" * MAX_BAD_WORD_LENGTH,) * (MAX_BAD_WORDS_LENGTH // MAX_BAD_WORD_LENGTH)),
    ("bad_words", ("x",) * MAX_BAD_WORDS),
    ("structured_outputs", StructuredOutputs(regex="a")),
]


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_out_of_range_is_refused_and_names_the_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert caught.value.status == 400


@pytest.mark.parametrize(("field", "value"), ACCEPTED)
def test_the_ends_of_a_range_are_accepted_as_they_are(field: str, value: Any) -> None:
    assert getattr(SamplingParams(**{field: value}), field) == value


def test_defaults_sample_from_the_model_s_own_distribution() -> None:
    params = SamplingParams()
    assert not params.is_greedy
    assert not params.has_penalties
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (1.0, 0, 1.0, 0.0)


def test_temperature_zero_is_greedy() -> None:
    assert SamplingParams(temperature=0).is_greedy
    assert not SamplingParams(temperature=1e-6).is_greedy


def test_top_k_of_minus_one_keeps_all() -> None:
    assert SamplingParams(top_k=-1).top_k == 0


def test_a_bare_stop_string_is_one_stop_string() -> None:
    assert SamplingParams(stop="END").stop == ("END",)  # type: ignore[arg-type]


def test_lists_are_stored_as_tuples() -> None:
    params = SamplingParams(stop=["a", "b"], stop_token_ids=[1, 2])  # type: ignore[arg-type]
    assert params.stop == ("a", "b")
    assert params.stop_token_ids == (1, 2)


@pytest.mark.parametrize("value", [None, [], ()])
def test_no_stop_is_an_empty_tuple(value: Any) -> None:
    assert SamplingParams(stop=value).stop == ()
    assert SamplingParams(stop_token_ids=value).stop_token_ids == ()


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="larger than max_tokens") as caught:
        SamplingParams(min_tokens=5, max_tokens=4)
    assert caught.value.param == "min_tokens"
    assert SamplingParams(min_tokens=4, max_tokens=4).min_tokens == 4


@pytest.mark.parametrize(
    "field", [{"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.1}]
)
def test_any_penalty_counts_as_penalties(field: dict[str, float]) -> None:
    assert SamplingParams(**field).has_penalties  # type: ignore[arg-type]


def test_token_ids_beyond_the_vocabulary_are_refused() -> None:
    params = SamplingParams(logit_bias={9: 1.0}, stop_token_ids=(9,))
    params.check_token_ids(10)
    for broken in (SamplingParams(logit_bias={9: 1.0}), SamplingParams(stop_token_ids=(9,))):
        with pytest.raises(InvalidRequestError, match="names token 9, but the vocabulary has 9 tokens"):
            broken.check_token_ids(9)


def test_params_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().n = 2  # type: ignore[misc]


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(), st.text(max_size=2)), max_size=3),
    st.dictionaries(st.one_of(st.integers(), st.text(max_size=2)), st.floats(), max_size=3),
)
CHECKED = sorted({field for field, _ in REFUSED})


@pytest.mark.parametrize("field", CHECKED)
@given(value=JUNK)
def test_anything_else_is_accepted_or_refused_by_name_but_never_crashes(field: str, value: Any) -> None:
    try:
        SamplingParams(**{field: value})
        named = field
    except InvalidRequestError as error:
        named = error.param
    assert named == field
