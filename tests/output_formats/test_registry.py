"""Formats are found by the names that users know, and guessed from what a model's files say."""

from __future__ import annotations

import pytest

from graphllm.output_formats import (
    FORMAT_NAMES,
    REASONING_NAMES,
    find_format,
    guess_format,
    with_reasoning,
)
from tests.output_formats.replies import read
from tests.output_formats.samples import SAMPLES, deepseek


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_every_name_is_a_format(name: str) -> None:
    assert find_format(name).name in SAMPLES


@pytest.mark.parametrize(
    "name", ["hermes", "llama3_json", "mistral", "pythonic", "deepseek", "glm", "kimi", "gpt-oss"]
)
def test_the_families_have_their_names(name: str) -> None:
    assert name in FORMAT_NAMES


def test_an_unknown_name_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        find_format("morse")
    with pytest.raises(KeyError):
        with_reasoning(find_format("hermes"), "morse")


@pytest.mark.parametrize("name", REASONING_NAMES)
def test_reasoning_is_chosen_apart_from_calls(name: str) -> None:
    chosen = with_reasoning(find_format("llama3_json"), name)
    if name == "none":
        assert chosen.reasoning is None
        assert chosen.reasoning_ends == ()
    else:
        assert chosen.reasoning is not None
        begin, end = chosen.reasoning.begins[0], chosen.reasoning_ends[0]
        reply = read(chosen, f'{begin}Hm{end}{{"name": "get_time", "parameters": {{}}}}')
        assert (reply.reasoning, reply.text, reply.called) == ("Hm", "", [("get_time", {})])


def test_messages_keep_their_reasoning() -> None:
    assert with_reasoning(find_format("gpt_oss"), "think") is find_format("gpt_oss")


# Lines that tell: parts of the chat templates of Hugging Face's repositories.
TEMPLATES = {
    "gpt_oss": "{{- '<|start|>assistant<|channel|>analysis<|message|>' }}",
    "kimi": "<|tool_calls_section_begin|>{% for call in calls %}<|tool_call_begin|>{{ call['id'] }}",
    "deepseek_v3": deepseek("<|tool calls begin|><|tool call begin|>function<|tool sep|>f\\n```json"),
    "deepseek_v31": deepseek("<|tool calls begin|><|tool call begin|>{{ name }}<|tool sep|>"),
    "glm": "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>",
    "qwen3_coder": "<tool_call>\n<function=example>\n<parameter=x>",
    "seed_oss": "<seed:tool_call>\n<function=example>\n<parameter=x>",
    "minimax_m2": "<minimax:tool_call>\n<invoke name=",
    "mistral": "{{- '[TOOL_CALLS] [' }}",
    "mistral_named": "{{- '[TOOL_CALLS]' + name + '[ARGS]' }}",
    "hermes": 'For each function call, return a json object within <tool_call></tool_call>: {"name":',
    "llama3_json": "{{- '<|python_tag|>' + tool_call.name }}",
    "lfm2": "<|tool_call_start|>[",
    "olmo3": "wrapped in <function_calls></function_calls> XML tags",
    "granite": "<|tool_call|>[",
    "phi4_mini": 'formatted as functools[{"name": ',
    "jamba": "<tool_calls>\n[",
    "nemotron": "<TOOLCALL>[",
    "generic": "<|im_start|>user\n{{ content }}<|im_end|>",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_tells_the_format(name: str) -> None:
    assert guess_format(TEMPLATES[name], {}).name == name


def test_a_vocabulary_tells_the_format_where_the_template_does_not() -> None:
    assert guess_format("", {"<|python_tag|>"}).name == "llama3_json"
    assert guess_format("", {"<|python_tag|>", "<|python_start|>"}).name == "pythonic"
    assert guess_format("", {"[TOOL_CALLS]", "[ARGS]"}).name == "mistral_named"
    assert guess_format("", {"[TOOL_CALLS]"}).name == "mistral"
    assert guess_format("", {"<|channel|>", "<|call|>"}).name == "gpt_oss"
    assert guess_format("", set()).name == "generic"


@pytest.mark.parametrize(
    ("template", "vocabulary", "begin"),
    [
        ("<tool_call> {% if '</think>' in content %}", set(), "<think>"),
        ("<tool_call>", {"<think>"}, "<think>"),
        ("<tool_call>", set(), None),
        ("[TOOL_CALLS]", {"[THINK]"}, "[THINK]"),
        ("Write your thoughts after 'Here is my thought process:'", set(), "Here is my thought process:"),
        ("<seed:think>", set(), "<seed:think>"),
    ],
)
def test_reasoning_is_guessed(template: str, vocabulary: set[str], begin: str | None) -> None:
    reasoning = guess_format(template, vocabulary).reasoning
    assert (None if reasoning is None else reasoning.begins[0]) == begin
