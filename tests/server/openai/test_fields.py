"""No field is accepted without an effect, a warning or an error; and none that an API has is forgotten."""

from __future__ import annotations

import logging
import re
from typing import Any

import msgspec
import openai.types.chat.completion_create_params as openai_chat
import openai.types.completion_create_params as openai_completions
import pytest

from graphllm.server.openai.chat_protocol import ChatCompletionRequest
from graphllm.server.openai.completion_protocol import CompletionRequest
from graphllm.server.openai.known_fields import CHAT_FIELDS, COMPLETION_FIELDS
from tests.server.posting import RICH_TEMPLATE, Posted, byte_tokenizer
from tools.update_api_fields import ENDPOINTS, Endpoint, descriptions, fields_of_apis

GAP_TOKENS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
TOKENIZER = byte_tokenizer(RICH_TEMPLATE, special=GAP_TOKENS, adds_start=True)
TOOL = {"type": "function", "function": {"name": "f"}}
SCHEMA = {"type": "object"}
# Reasoning, text, and a call.
SAID = '<think>\nHm, well.\n</think>\n\nFour.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'

# A value for each field that is not what it means when it is left out, and what has to stand beside it.
COMMON: dict[str, tuple[Any, dict[str, Any]]] = {
    "model": ("other", {}),
    "stream": (True, {}),
    "stream_options": ({"include_usage": True}, {"stream": True}),
    "n": (2, {}),
    "best_of": (2, {}),
    "max_tokens": (7, {}),
    "min_tokens": (3, {}),
    "temperature": (0.5, {}),
    "top_p": (0.5, {}),
    "top_k": (5, {}),
    "min_p": (0.5, {}),
    "seed": (5, {}),
    "repetition_penalty": (1.5, {}),
    "presence_penalty": (1.5, {}),
    "frequency_penalty": (1.5, {}),
    "logit_bias": ({"5": 1.5}, {}),
    "stop": (["x"], {}),
    "stop_token_ids": ([5], {}),
    "ignore_eos": (True, {}),
    "skip_special_tokens": (False, {}),
    "include_stop_str_in_output": (True, {}),
    "no_stop_trim": (True, {}),
    "allowed_token_ids": ([5], {}),
    "bad_words": (["x"], {}),
    "prompt_logprobs": (1, {}),
    "return_token_ids": (True, {}),
    "truncate_prompt_tokens": (1, {}),
    "truncation_side": ("right", {"truncate_prompt_tokens": 1}),
    "priority": (5, {}),
    "cache_salt": ("x", {}),
    "user": ("x", {}),
    "metadata": ({"a": "b"}, {}),
    "safety_identifier": ("x", {}),
    "prompt_cache_key": ("x", {}),
    "response_format": ({"type": "json_object"}, {}),
    "structured_outputs": ({"choice": ["a"]}, {}),
    "guided_json": (SCHEMA, {}),
    "guided_regex": ("a", {}),
    "guided_choice": (["a"], {}),
    "guided_grammar": ('start: "a"', {}),
    "guided_whitespace_pattern": (" ?", {"guided_json": SCHEMA}),
    "regex": ("a", {}),
    "ebnf": ('root ::= "a"', {}),
    "json_schema": (SCHEMA, {}),
}
CHAT = {
    **COMMON,
    "messages": ([{"role": "user", "content": "Bye"}], {}),
    "max_completion_tokens": (7, {}),
    "logprobs": (True, {}),
    "top_logprobs": (2, {"logprobs": True}),
    "return_tokens_as_token_ids": (True, {"logprobs": True}),
    "tools": ([TOOL], {}),
    "tool_choice": ("required", {"tools": [TOOL]}),
    "parallel_tool_calls": (False, {"tools": [TOOL], "tool_choice": "required"}),
    "functions": ([TOOL["function"]], {}),
    "function_call": ("none", {"functions": [TOOL["function"]]}),
    "reasoning_effort": ("none", {}),
    "reasoning": ({"exclude": True}, {}),
    "include_reasoning": (False, {}),
    "separate_reasoning": (False, {}),
    "stream_reasoning": (False, {"stream": True}),
    "chat_template_kwargs": ({"enable_thinking": False}, {}),
    "documents": ([{"text": "x"}], {}),
    "add_generation_prompt": (False, {}),
    "continue_final_message": (True, {}),
    "add_special_tokens": (True, {}),
}
COMPLETIONS = {
    **COMMON,
    "prompt": ("Bye", {}),
    "logprobs": (1, {}),
    "return_tokens_as_token_ids": (True, {"logprobs": 1}),
    "echo": (True, {}),
    "suffix": ("x", {}),
    "add_special_tokens": (False, {}),
}
PARTS = {
    "stream_options.continuous_usage_stats": (
        {"include_usage": True, "continuous_usage_stats": True},
        {"include_usage": True},
    ),
    "stream_options.include_obfuscation": ({"include_obfuscation": True}, {}),
}


def observed(path: str, fields: dict[str, Any], caplog: pytest.LogCaptureFixture) -> Any:
    """All that comes of a request: what the engine was given, what the client reads, what is logged."""
    caplog.clear()
    posted = Posted(path, tokenizer=TOKENIZER, **fields)
    if posted.channel.writes:
        return posted.status, posted.json["error"]["param"]
    given = [
        (one.prompt_token_ids, one.params, one.cache_salt, one.priority) for one in posted.engine.submitted
    ]
    posted.answered(SAID)
    body = re.sub(rb"(chatcmpl-|cmpl-|call_)[0-9a-f]+", rb"\1ID", posted.body)
    body = re.sub(rb'"created":\d+', b'"created":0', body)
    logged = [re.sub(r"cmpl-[0-9a-f]+", "ID", record.getMessage()) for record in caplog.records]
    return given, body, logged


def check_effect(
    path: str, name: str, value: Any, beside: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    assert observed(path, beside, caplog) == observed(path, beside, caplog), "the comparison itself"
    assert observed(path, {**beside, name: value}, caplog) != observed(path, beside, caplog)


@pytest.mark.parametrize("name", ChatCompletionRequest.__struct_fields__)
def test_every_field_of_a_chat_has_an_effect(name: str, caplog: pytest.LogCaptureFixture) -> None:
    value, beside = CHAT[name]
    check_effect("chat", name, value, beside, caplog)


@pytest.mark.parametrize("name", CompletionRequest.__struct_fields__)
def test_every_field_of_a_completion_has_an_effect(name: str, caplog: pytest.LogCaptureFixture) -> None:
    value, beside = COMPLETIONS[name]
    check_effect("completions", name, value, beside, caplog)


@pytest.mark.parametrize("path", ["chat", "completions"])
@pytest.mark.parametrize("name", PARTS)
def test_parts_of_stream_options_have_an_effect(
    name: str, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with_part, without = PARTS[name]
    base = {"stream": True, "stream_options": without}
    assert observed(path, {**base, "stream_options": with_part}, caplog) != observed(path, base, caplog)


@pytest.mark.parametrize(
    ("path", "name"),
    [("chat", name) for name in CHAT_FIELDS] + [("completions", name) for name in COMPLETION_FIELDS],
)
def test_a_field_that_is_not_honoured_is_refused_or_warned_of(path: str, name: str) -> None:
    known = (CHAT_FIELDS if path == "chat" else COMPLETION_FIELDS)[name]
    other: dict[str, Any] = {name: {"anything": "else"}}
    posted = Posted(path, **other)
    if known.is_tolerated:
        warnings = posted.answered("4").json["warnings"]
        assert warnings == [{"field": name, "message": known.note}]
    else:
        assert posted.error["param"] == name
        assert posted.error["code"] == "unsupported_parameter" and known.note in posted.error["message"]
    for value in (None, *known.neutral):
        assert "warnings" not in Posted(path, **{name: value}).answered("4").json


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.key)
def test_every_field_that_an_api_has_is_accounted_for(endpoint: Endpoint) -> None:
    ours = {*endpoint.struct.__struct_fields__, *endpoint.known_fields}
    for api, names in fields_of_apis(endpoint.key).items():
        assert set(names) - ours == set(), f"fields of {api} that nobody has decided on"
    both = set(endpoint.struct.__struct_fields__) & set(endpoint.known_fields)
    assert both == set(), "honoured and not honoured"


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.key)
def test_every_field_says_what_it_does_in_a_line(endpoint: Endpoint) -> None:
    for name, text in descriptions(endpoint.struct).items():
        assert text.endswith(".") and "\n" not in text and len(text) < 100, name
    for name, known in endpoint.known_fields.items():
        assert known.note.endswith("."), name


def test_a_field_without_a_description_is_noticed() -> None:
    class Bare(msgspec.Struct):
        field: int | None = None

    with pytest.raises(ValueError, match=r"Bare\.field"):
        descriptions(Bare)


def test_the_lists_have_all_that_the_official_client_has() -> None:
    for key, module in (("chat", openai_chat), ("completions", openai_completions)):
        official = set(module.CompletionCreateParamsBase.__annotations__) | {"stream"}
        assert official == set(fields_of_apis(key)["OpenAI"])
