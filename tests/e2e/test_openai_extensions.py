"""What vLLM's and SGLang's servers add to OpenAI's API, with the official client and the demo model."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.e2e.serving import ServerProcess

CAPITAL: Any = [{"role": "user", "content": "What is the capital of France?"}]


def chat(client: openai.OpenAI, messages: Any = None, **extra: Any) -> Any:
    return client.chat.completions.create(
        model="demo", messages=messages or CAPITAL, temperature=0, max_tokens=8, extra_body=extra
    )


def completion(client: openai.OpenAI, prompt: Any, **fields: Any) -> Any:
    return client.completions.create(model="demo", prompt=prompt, temperature=0, **fields)


def test_an_echoed_prompt_is_scored_as_the_text_behind_it_was(client: openai.OpenAI) -> None:
    """The log probabilities of a text are the same whether the model wrote it or was given it."""
    written = completion(client, "1 2 3 4", max_tokens=6, logprobs=2, extra_body={"return_token_ids": True})
    token_ids = [*written.choices[0].prompt_token_ids, *written.choices[0].token_ids]
    given = completion(client, token_ids, max_tokens=0, echo=True, logprobs=2)
    (choice,) = given.choices
    assert choice.text == "1 2 3 4" + written.choices[0].text and given.usage.completion_tokens == 0
    assert choice.finish_reason == "length"
    scores = choice.logprobs
    assert scores.token_logprobs[0] is None and len(scores.tokens) == len(token_ids)
    assert "".join(scores.tokens) == choice.text
    assert scores.token_logprobs[-6:] == pytest.approx(written.choices[0].logprobs.token_logprobs, abs=1e-3)
    assert [list(top) for top in scores.top_logprobs[-6:]] == [
        list(top) for top in written.choices[0].logprobs.top_logprobs
    ]


def test_a_streamed_echo_comes_before_the_text(client: openai.OpenAI) -> None:
    whole = completion(client, "1 2 3", max_tokens=4, echo=True, logprobs=1)
    chunks = list(completion(client, "1 2 3", max_tokens=4, echo=True, logprobs=1, stream=True))
    assert chunks[0].choices[0].text == "1 2 3"
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    tokens = [
        token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.tokens
    ]
    assert tokens == whole.choices[0].logprobs.tokens


def test_prompt_logprobs_name_every_token_of_the_prompt(client: openai.OpenAI) -> None:
    answer = chat(client, prompt_logprobs=2, return_token_ids=True)
    first, *others = answer.prompt_logprobs
    assert first is None and len(others) == answer.usage.prompt_tokens - 1
    for token_id, entry in zip(answer.prompt_token_ids[1:], others, strict=True):
        score = entry[str(token_id)]
        assert score["logprob"] <= 0 and score["rank"] >= 1
        assert (score["rank"] <= 2) == (len(entry) == 2)
    # The template's own words surprise nobody.
    assert others[-1][str(answer.prompt_token_ids[-1])]["rank"] == 1


def test_the_final_message_is_continued(client: openai.OpenAI) -> None:
    whole = chat(client).choices[0].message.content
    begun = [*CAPITAL, {"role": "assistant", "content": whole[:11]}]
    rest = chat(client, begun, continue_final_message=True).choices[0].message.content
    assert whole[:11] + rest == whole


def test_only_allowed_tokens_and_no_bad_words_are_generated(client: openai.OpenAI) -> None:
    plain = chat(client).choices[0].message.content
    assert "Paris" in plain
    assert "Paris" not in chat(client, bad_words=["Paris"]).choices[0].message.content
    digits = client.completions.create(
        model="demo",
        prompt="1 2 3",
        max_tokens=5,
        temperature=1,
        extra_body={"allowed_token_ids": [33, 34, 35], "return_token_ids": True},
    )
    assert set(digits.choices[0].token_ids) <= {33, 34, 35}  # type: ignore[attr-defined]


def test_a_prompt_is_cut_where_that_is_asked_for(client: openai.OpenAI, server: ServerProcess) -> None:
    long = "word " * 20_000
    with pytest.raises(openai.BadRequestError):
        completion(client, long, max_tokens=1)
    answer = completion(client, long, max_tokens=1, extra_body={"truncate_prompt_tokens": 50})
    assert answer.usage.prompt_tokens == 50


def test_what_is_not_honoured_is_warned_of(client: openai.OpenAI) -> None:
    answer = chat(client, store=True, chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low")
    assert [warning["field"] for warning in answer.warnings] == [
        "store",
        "chat_template_kwargs.enable_thinking",
        "reasoning_effort",
    ]


def test_running_usage_counts_tokens_as_they_come(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.chat.completions.create(
            model="demo", messages=CAPITAL, temperature=0, max_tokens=8, stream=True, stream_options=options
        )  # type: ignore[call-overload]
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] == 8


def test_a_model_without_gap_tokens_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        completion(client, "def f():", suffix="return x", max_tokens=4)
    assert caught.value.param == "suffix" and "fill-in-the-middle" in str(caught.value)
