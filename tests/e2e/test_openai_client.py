"""The official client does with this server what it does with OpenAI's."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from tests.e2e.serving import ServerProcess

COUNT = [{"role": "user", "content": "Count from 1 to 10."}]
COUNTED = "1. 1\n2. 2\n3. 3\n4. 4\n5. 5\n6. 6\n7."


def greedy_chat(client: openai.OpenAI, messages: Any = None, **fields: Any) -> Any:
    fields = {"temperature": 0, "max_tokens": 32, **fields}
    return client.chat.completions.create(model="demo", messages=messages or COUNT, **fields)


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def test_a_chat_is_answered_whole(client: openai.OpenAI) -> None:
    answer = greedy_chat(client)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.model == "demo" and answer.system_fingerprint
    assert answer._request_id == answer.id
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", COUNTED)
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    usage = answer.usage
    assert usage.completion_tokens == 32
    assert usage.total_tokens == usage.prompt_tokens + 32 and usage.prompt_tokens > 10


def test_a_stream_opens_with_the_role_and_closes_with_the_reason(client: openai.OpenAI) -> None:
    chunks = list(greedy_chat(client, stream=True))
    first, last = chunks[0].choices[0], chunks[-1].choices[0]
    assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
    assert (last.delta.role, last.delta.content, last.finish_reason) == (None, None, "length")
    assert text_of(chunks) == COUNTED
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)
    # Text comes as it is made, not in one piece at the end.
    assert len(chunks) > 16


def test_usage_comes_last_and_is_null_before(client: openai.OpenAI, server: ServerProcess) -> None:
    chunks = list(greedy_chat(client, stream=True, stream_options={"include_usage": True}))
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage == greedy_chat(client).usage
    # The client library cannot tell null from absent; the bytes can.
    body = {"model": "demo", "messages": COUNT, "max_tokens": 3, "stream": True}
    plain = server.post("/v1/chat/completions", body).body
    asked = server.post("/v1/chat/completions", {**body, "stream_options": {"include_usage": True}}).body
    assert b'"usage"' not in plain
    assert asked.count(b'"usage":null') == asked.count(b"data: {") - 1
    assert plain.endswith(b"data: [DONE]\n\n") and asked.endswith(b"data: [DONE]\n\n")


def test_eight_streams_at_once_say_what_each_says_alone(client: openai.OpenAI, server: ServerProcess) -> None:
    questions = [f"Count from {start} to {start + 10}." for start in range(1, 9)]

    async def stream(client: openai.AsyncOpenAI, question: str) -> tuple[str, str | None, int]:
        text, reason, chunks = "", None, 0
        async for chunk in await client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=24,
            stream=True,
        ):
            chunks += 1
            text += chunk.choices[0].delta.content or ""
            reason = chunk.choices[0].finish_reason or reason
        return text, reason, chunks

    async def stream_all() -> list[tuple[str, str | None, int]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(stream(client, question) for question in questions))

    together = asyncio.run(stream_all())
    for question, (text, reason, num_chunks) in zip(questions, together, strict=True):
        alone = greedy_chat(client, [{"role": "user", "content": question}], max_tokens=24).choices[0]
        assert (text, reason) == (alone.message.content, alone.finish_reason)
        assert num_chunks > 8


def test_three_choices_differ_and_are_counted_together(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"n": 3, "seed": 5, "temperature": 1.0, "max_tokens": 12}
    answer = greedy_chat(client, [{"role": "user", "content": "Tell me a story."}], **request)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3
    assert answer.usage.completion_tokens == 36
    chunks = list(
        greedy_chat(client, [{"role": "user", "content": "Tell me a story."}], stream=True, **request)
    )
    assert [text_of(chunks, index) for index in range(3)] == texts
    reasons = defaultdict(list)
    for chunk in chunks:
        for choice in chunk.choices:
            reasons[choice.index].append(choice.finish_reason)
    assert {index: reason[-1] for index, reason in reasons.items()} == dict.fromkeys(range(3), "length")
    assert all(reason is None for reason_list in reasons.values() for reason in reason_list[:-1])


def test_a_seed_repeats_a_text(client: openai.OpenAI) -> None:
    request = {"seed": 11, "temperature": 0.9, "max_tokens": 16}
    first, second = (greedy_chat(client, **request).choices[0].message.content for _ in range(2))
    assert first == second
    other = greedy_chat(client, **{**request, "seed": 12}).choices[0].message.content
    assert other != first


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("3", "1. 1\n2. 2\n"),
        # Across the borders of the tokens "\n", "3", ".", " ", "3".
        ("\n3. ", "1. 1\n2. 2"),
        ([". 2\n3", "nothing"], "1. 1\n2"),
        (["a", "b", "c", " 1\n"], "1."),
        # A beginning of a stop string that does not go on is text.
        (["1\n3", "7.x"], COUNTED),
    ],
)
def test_stop_strings(client: openai.OpenAI, stop: Any, expected: str, stream: bool) -> None:
    if stream:
        chunks = list(greedy_chat(client, stop=stop, stream=True))
        text, reason = text_of(chunks), chunks[-1].choices[0].finish_reason
    else:
        choice = greedy_chat(client, stop=stop).choices[0]
        text, reason = choice.message.content, choice.finish_reason
    assert (text, reason) == (expected, "length" if expected == COUNTED else "stop")


def test_the_stop_string_can_be_kept(client: openai.OpenAI) -> None:
    extra = {"include_stop_str_in_output": True}
    choice = greedy_chat(client, stop="\n3", extra_body=extra).choices[0]
    assert choice.message.content == "1. 1\n2. 2\n3"
    assert choice.model_extra == {"stop_reason": "\n3", "matched_stop": "\n3"}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_emoji_arrive_whole(client: openai.OpenAI, stream: bool) -> None:
    # Each emoji is several tokens; the model goes on as the prompt begins.
    prompt = (
        "\U0001f600\U0001f680\U0001f600\U0001f680\U0001f600\U0001f680\U0001f600\U0001f680\U0001f600\U0001f680"
    )
    request: dict[str, Any] = {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": 24}
    if stream:
        pieces = [chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)]
        assert all("\ufffd" not in piece for piece in pieces[:-2])
        text = "".join(pieces)
    else:
        text = client.completions.create(**request).choices[0].text
    assert "\U0001f680\U0001f680" in text
    assert text == client.completions.create(**request).choices[0].text


def test_chat_logprobs(client: openai.OpenAI) -> None:
    whole = greedy_chat(client, logprobs=True, top_logprobs=3, max_tokens=8)
    entries = whole.choices[0].logprobs.content
    assert len(entries) == whole.usage.completion_tokens == 8
    assert "".join(entry.token for entry in entries) == whole.choices[0].message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        # Greedy took the most likely token.
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1.0001
        assert bytes(entry.bytes).decode() == entry.token
    chunks = list(greedy_chat(client, logprobs=True, top_logprobs=3, max_tokens=8, stream=True))
    streamed = [
        entry
        for chunk in chunks
        if chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]


def test_completion_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="demo", prompt="The capital of France is", temperature=0, max_tokens=6, logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.text_offset is not None
    assert logprobs.token_logprobs is not None and logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 6
    text = answer.choices[0].text
    for token, offset, top in zip(logprobs.tokens, logprobs.text_offset, logprobs.top_logprobs, strict=True):
        assert text[offset:].startswith(token)
        assert token in top and len(top) == 2


def test_completions_take_prompts_in_every_form(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 6}
    text = client.completions.create(prompt="Count from 1", **request)
    assert text.object == "text_completion" and text.id.startswith("cmpl-")
    assert text.usage is not None and text.usage.completion_tokens == 6
    both = client.completions.create(prompt=["Count from 1", "The sky is"], **request)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == text.choices[0].text
    ids = [504, 3575, 282, 4649, 314]  # "The capital of France is"
    one = client.completions.create(prompt=ids, **request)
    assert one.usage is not None and one.usage.prompt_tokens == 5
    assert (
        one.choices[0].text
        == client.completions.create(prompt="The capital of France is", **request).choices[0].text
    )
    several = client.completions.create(prompt=[ids, ids[:3]], **request)
    assert several.usage is not None and several.usage.prompt_tokens == 8
    assert several.choices[0].text == one.choices[0].text


def test_a_batch_numbers_its_choices_prompt_by_prompt(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {
        "model": "demo",
        "prompt": ["One two three", "The sky is", "A B C"],
        "n": 2,
        "seed": 3,
        "max_tokens": 5,
    }
    whole = client.completions.create(**request)
    assert [choice.index for choice in whole.choices] == list(range(6))
    texts: dict[int, str] = defaultdict(str)
    for chunk in client.completions.create(**request, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert [texts[index] for index in range(6)] == [choice.text for choice in whole.choices]
    assert whole.usage is not None and whole.usage.completion_tokens == 30
    alone = client.completions.create(**{**request, "prompt": "The sky is"})
    assert [choice.text for choice in alone.choices] == [choice.text for choice in whole.choices[2:4]]


def test_completions_default_to_sixteen_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt="Once upon a time", temperature=0)
    assert answer.usage is not None and answer.usage.completion_tokens == 16


def test_sampling_controls_have_their_effect(client: openai.OpenAI) -> None:
    plain = greedy_chat(client).choices[0].message.content
    # 33 is the token of "1", the golden's first.
    assert not greedy_chat(client, logit_bias={"33": -100}).choices[0].message.content.startswith("1")
    stopped = greedy_chat(client, extra_body={"stop_token_ids": [198]}).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("1. 1", "stop")
    assert stopped.model_extra == {"stop_reason": 198, "matched_stop": 198}
    assert greedy_chat(client, temperature=1.5, extra_body={"top_k": 1}).choices[0].message.content == plain
    assert greedy_chat(client, temperature=1.5, top_p=1e-6).choices[0].message.content == plain
    assert greedy_chat(client, temperature=1.5, extra_body={"min_p": 1.0}).choices[0].message.content == plain
    assert greedy_chat(client, extra_body={"repetition_penalty": 2.0}).choices[0].message.content != plain
    assert greedy_chat(client, frequency_penalty=2.0).choices[0].message.content != plain
    capital = [{"role": "user", "content": "What is the capital of France?"}]
    short = greedy_chat(client, capital)
    assert short.choices[0].finish_reason == "stop" and short.usage.completion_tokens == 8
    assert greedy_chat(client, capital, extra_body={"min_tokens": 20}).usage.completion_tokens >= 20
    assert greedy_chat(client, capital, extra_body={"ignore_eos": True}).usage.completion_tokens == 32
    shown = greedy_chat(client, capital, extra_body={"ignore_eos": True, "skip_special_tokens": False})
    assert "<|im_end|>" in shown.choices[0].message.content
    assert greedy_chat(client, max_tokens=openai.omit, max_completion_tokens=4).usage.completion_tokens == 4


def test_system_developer_and_parts_reach_the_model(client: openai.OpenAI) -> None:
    question = {"role": "user", "content": "What is the capital of France?"}
    system = greedy_chat(client, [{"role": "system", "content": "Answer like a pirate."}, question])
    developer = greedy_chat(client, [{"role": "developer", "content": "Answer like a pirate."}, question])
    assert system.usage.prompt_tokens == developer.usage.prompt_tokens
    assert system.choices[0].message.content == developer.choices[0].message.content
    parts = {"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}
    assert greedy_chat(client, [parts]).choices == greedy_chat(client, [question]).choices


def test_models_are_listed_and_retrieved(client: openai.OpenAI, server: ServerProcess) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("demo", "model", "graphllm")
    assert client.models.retrieve("demo") == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"
    assert server.get("/version").json()["version"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 0}, "n"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"stop": 5}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"9999999": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 50}, "top_logprobs"),
        ({"seed": "x"}, "seed"),
        ({"presence_penalty": 9}, "presence_penalty"),
        ({"frequency_penalty": 9}, "frequency_penalty"),
        ({"tools": [{"type": "function", "function": {"name": "f f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json"}}, "response_format.type"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"extra_body": {"min_p": -1}}, "min_p"),
        ({"extra_body": {"top_k": -7}}, "top_k"),
        ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty"),
        ({"extra_body": {"stop_token_ids": [10**9]}}, "stop_token_ids"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"max_tokens": openai.omit, "max_completion_tokens": 10**6}, "max_completion_tokens"),
    ],
)
def test_a_bad_field_raises_an_error_that_names_it(
    client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        greedy_chat(client, **fields)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_an_unknown_model_raises_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=COUNT)  # type: ignore[arg-type]
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_prompt_longer_than_the_context_is_told_both_numbers(client: openai.OpenAI) -> None:
    for length in (9_000, 400_000):
        with pytest.raises(openai.BadRequestError) as caught:
            greedy_chat(client, [{"role": "user", "content": "word " * length}])
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.param == "messages"
        assert "8192" in caught.value.message
        stated = [int(word) for word in caught.value.message.split() if word.isdigit() and int(word) > 8192]
        assert stated
