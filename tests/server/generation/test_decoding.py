"""What a client reads when a body is wrong, and that a right one takes every documented field."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from graphllm.errors import InvalidRequestError, UnsupportedFieldError
from graphllm.server.generation.decoding import BodyDecoder
from graphllm.server.openai.chat_protocol import ChatCompletionRequest
from graphllm.server.openai.completion_protocol import CompletionRequest
from graphllm.server.openai.known_fields import CHAT_FIELDS, COMPLETION_FIELDS

CHAT = BodyDecoder(ChatCompletionRequest, CHAT_FIELDS)
COMPLETION = BodyDecoder(CompletionRequest, COMPLETION_FIELDS)
USER = [{"role": "user", "content": "Hi"}]


def chat(**fields: Any) -> ChatCompletionRequest:
    return CHAT.decode(json.dumps({"model": "demo", "messages": USER, **fields}).encode()).fields


def completion(**fields: Any) -> CompletionRequest:
    return COMPLETION.decode(json.dumps({"model": "demo", "prompt": "Hi", **fields}).encode()).fields


def raw_chat(extra: bytes) -> ChatCompletionRequest:
    return CHAT.decode(b'{"model":"demo","messages":[{"role":"user","content":"Hi"}],' + extra + b"}").fields


def test_every_sampling_field_reaches_the_sampling_params() -> None:
    params = chat(
        n=3,
        max_completion_tokens=7,
        min_tokens=2,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        seed=-5,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        logit_bias={"15": -100, "16": 2.5},
        stop=["a", "b"],
        stop_token_ids=[7],
        ignore_eos=True,
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        logprobs=True,
        top_logprobs=4,
    ).sampling_params()
    assert (params.n, params.max_tokens, params.min_tokens) == (3, 7, 2)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 40, 0.1)
    assert (params.seed, params.repetition_penalty) == (-5, 1.1)
    assert (params.presence_penalty, params.frequency_penalty) == (0.2, -0.3)
    assert params.logit_bias == {15: -100.0, 16: 2.5}
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (7,))
    assert params.ignore_eos and not params.skip_special_tokens and params.include_stop_str_in_output
    assert params.logprobs == 4


def test_defaults_are_those_of_openai() -> None:
    params = chat().sampling_params()
    assert (params.temperature, params.top_p, params.n) == (1.0, 1.0, 1)
    assert params.max_tokens is None and params.logprobs is None
    assert completion().sampling_params().max_tokens == 16


def test_null_means_the_default() -> None:
    names = set(ChatCompletionRequest.__struct_fields__) - {"model", "messages"}
    assert (
        chat(**dict.fromkeys(names), **dict.fromkeys(CHAT_FIELDS)).sampling_params()
        == chat().sampling_params()
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 5.5}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 5, "max_tokens": 6}, "max_completion_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2**64}, "temperature"),
        ({"temperature": [1]}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 2**64}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a", 5]}, "stop[1]"),
        ({"stop": ["x"] * 100}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": ["1"]}, "stop_token_ids[0]"),
        ({"logit_bias": {"abc": 1}}, "logit_bias"),
        ({"logit_bias": {"1" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": "x"}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logprobs": 5}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
        ({"user": 5}, "user"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"model": None}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "Hi", "nmae": "x"}]}, "messages[0].nmae"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(**fields).chat_request(max_model_len=100)
    assert caught.value.param == param
    assert caught.value.status == 400
    assert param.split("[")[0].split(".")[-1] in caught.value.message.lower()


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_a_missing_field_is_named(missing: str) -> None:
    body = {"model": "demo", "messages": USER}
    del body[missing]
    with pytest.raises(InvalidRequestError) as caught:
        CHAT.decode(json.dumps(body).encode())
    assert caught.value.param == missing


@pytest.mark.parametrize("endpoint", [chat, completion])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_beam_search", True),
        ("length_penalty", 2.0),
        ("logits_processors", ["x"]),
        ("lora_path", "x"),
        ("stop_regex", "a+"),
        ("kv_transfer_params", {"a": 1}),
        ("return_hidden_states", True),
        ("routed_dp_rank", 1),
    ],
)
def test_a_known_field_that_is_not_honoured_is_refused_by_name(
    endpoint: Callable[..., Any], name: str, value: Any
) -> None:
    with pytest.raises(UnsupportedFieldError) as caught:
        endpoint(**{name: value})
    assert caught.value.param == name and name in caught.value.message
    assert caught.value.code == "unsupported_parameter"


def test_a_type_of_its_own_is_no_neutral_value() -> None:
    # 0 == False in Python, not in JSON.
    with pytest.raises(UnsupportedFieldError):
        chat(use_beam_search=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("store", True), ("service_tier", "flex"), ("prediction", {"type": "content", "content": "x"})],
)
def test_a_field_that_can_be_tolerated_is_accepted_with_a_warning(name: str, value: Any) -> None:
    body = CHAT.decode(json.dumps({"model": "demo", "messages": USER, name: value}).encode())
    (warning,) = body.warnings
    assert warning.field == name and warning.message
    neutral = CHAT_FIELDS[name].neutral[:1] or (None,)
    body = CHAT.decode(json.dumps({"model": "demo", "messages": USER, name: neutral[0]}).encode())
    assert body.warnings == ()


def test_a_lenient_decoder_drops_unknown_fields_with_warnings() -> None:
    lenient = BodyDecoder(ChatCompletionRequest, CHAT_FIELDS, lenient=True)
    message = {"role": "user", "content": "Hi", "nmae": "x"}
    fields = {"model": "demo", "messages": [message], "temprature": 1, "temperature": 0.5}
    body = lenient.decode(json.dumps(fields).encode())
    assert [warning.field for warning in body.warnings] == ["temprature", "messages[0].nmae"]
    assert body.fields.temperature == 0.5 and body.fields.messages[0].content == "Hi"
    # What is wrong stays wrong.
    with pytest.raises(InvalidRequestError):
        lenient.decode(json.dumps({**fields, "temperature": "hot"}).encode())


def test_a_lenient_decoder_gives_up_on_a_body_that_is_all_unknown_fields() -> None:
    lenient = BodyDecoder(ChatCompletionRequest, CHAT_FIELDS, lenient=True)
    messages = [{"role": "user", "content": "Hi", f"x{index}": 1} for index in range(100)]
    for fields in ({"messages": messages}, {"messages": USER, **{f"x{index}": 1 for index in range(100)}}):
        with pytest.raises(InvalidRequestError) as caught:
            lenient.decode(json.dumps({"model": "demo", **fields}).encode())
        assert caught.value.code == "unknown_parameter"


def test_a_lenient_decoder_reads_a_large_body_a_few_times_only() -> None:
    lenient = BodyDecoder(ChatCompletionRequest, CHAT_FIELDS, lenient=True)

    def body(num_unknown: int) -> bytes:
        large = [{"role": "user", "content": "x" * 1_500_000}]
        unknown = [{"role": "user", "content": "Hi", f"x{index}": 1} for index in range(num_unknown)]
        return json.dumps({"model": "demo", "messages": large + unknown}).encode()

    assert len(lenient.decode(body(2)).warnings) == 2
    with pytest.raises(InvalidRequestError):
        lenient.decode(body(3))


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u1", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"service_tier": "default", "parallel_tool_calls": True, "tools": [], "tool_choice": "none"},
        {"response_format": {"type": "text"}, "modalities": ["text"], "functions": [], "n": 2, "best_of": 2},
        {"prompt_cache_key": "k", "safety_identifier": "s", "verbosity": "medium", "echo": False},
    ],
)
def test_values_that_change_nothing_are_accepted(fields: dict[str, Any]) -> None:
    expected = chat(n=fields.get("n")).sampling_params()
    assert chat(**fields).sampling_params() == expected


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("temprature", "temperature"), ("max_token", "max_tokens"), ("topp", "top_p"), ("tool", "tools")],
)
def test_an_unknown_field_is_answered_with_the_nearest_known_name(name: str, nearest: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(**{name: 1})
    assert caught.value.param == name
    assert f"'{nearest}'" in caught.value.message


def test_an_unknown_field_without_a_neighbour_gets_no_guess() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(zzqqzz=1)
    assert caught.value.param == "zzqqzz" and "Did you mean" not in caught.value.message


def test_a_huge_field_name_is_not_sent_back_whole() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(**{"a" * 1_000_000: 1})
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"{", "not valid JSON"),
        (b'{"model":"demo"', "not valid JSON"),
        (b"{'model': 'demo'}", "not valid JSON"),
        (b'{"model":"demo"} x', "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b'{"model":"\xff"}', "not valid UTF-8"),
        (b'{"model":"demo","messages":[{"role":"user","content":"\\ud800"}]}', "not valid JSON"),
        (b'{"model":"demo","messages":[{"role":"user","content":"\\udc00\\ud800"}]}', "not valid JSON"),
        (b"[" * 10_000, "nested too deeply"),
        (b'{"x":' + b"[" * 10_000 + b"]" * 10_000 + b"}", "nested too deeply"),
        (b'{"messages":' + b'[{"content":' * 10_000, "nested too deeply"),
        (b'{"tools":' * 10_000 + b"1" + b"}" * 10_000, "nested too deeply"),
    ],
)
def test_what_is_no_json_object_is_refused_with_the_reason(body: bytes, words: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        CHAT.decode(body)
    assert words in caught.value.message
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity"])
def test_numbers_that_are_not_json_are_refused(number: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="not valid JSON"):
        raw_chat(b'"temperature":' + number)


@pytest.mark.parametrize("number", [b"1e400", b"-1e999", b"1" + b"0" * 5000])
@pytest.mark.parametrize("name", [b"temperature", b"max_tokens", b"seed"])
def test_numbers_out_of_every_range_are_refused_by_field(name: bytes, number: bytes) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        raw_chat(b'"%b":%b' % (name, number)).chat_request(max_model_len=100)
    assert caught.value.param == name.decode()


def test_a_lone_surrogate_is_called_by_its_name() -> None:
    with pytest.raises(InvalidRequestError, match="other half"):
        raw_chat(b'"user":"\\ud83d"')


def test_a_surrogate_pair_is_one_character() -> None:
    assert raw_chat(b'"user":"\\ud83d\\ude00"').user == "\U0001f600"


def test_the_last_of_duplicate_keys_wins() -> None:
    assert raw_chat(b'"max_tokens":1,"max_tokens":2').max_tokens == 2


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (None, "prompt"),
        (5, "prompt"),
        ({"a": 1}, "prompt"),
        ([True], "prompt[0]"),
        ([1, [2, "x"]], "prompt[1][1]"),
    ],
)
def test_a_prompt_of_a_wrong_type_is_refused(prompt: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(prompt=prompt)
    assert caught.value.param == param
