"""The comparison of first tokens: what is asked, and what becomes of the times."""

from __future__ import annotations

import json

from benchmarks.prefix_cache import Answer, question, summary


def answer(seconds: float, num_cached: int) -> Answer:
    return Answer(seconds=seconds, num_prompt_tokens=2020, num_cached=num_cached, text="x")


def test_the_gain_is_that_of_the_medians() -> None:
    computed = [answer(seconds, 0) for seconds in (9.0, 1.0, 2.0)]
    found = [answer(seconds, 2000) for seconds in (0.1, 0.2, 5.0)]
    line = summary(computed, found)
    assert (line["first_token_ms_computed"], line["first_token_ms_cached"]) == (2000.0, 200.0)
    assert line["times"] == 10.0
    assert (line["prompt_tokens"], line["cached_tokens"], line["rounds"]) == (2020, 2000, 3)


def test_both_kinds_ask_the_same_question_under_other_salts() -> None:
    own, shared = (json.loads(question("Be brief.", 3, salt=salt)) for salt in ("own-3", "shared"))
    assert (own.pop("cache_salt"), shared.pop("cache_salt")) == ("own-3", "shared")
    assert own == shared
    other = json.loads(question("Be brief.", 4, salt="shared"))
    assert other["messages"][0] == shared["messages"][0]
    assert other["messages"][1] != shared["messages"][1]
