"""Whatever a model writes: time linear in it, no deep recursion, nothing lost, nothing kept for long."""

from __future__ import annotations

import time

import pytest

from graphllm.output_formats import TextDelta, find_format
from graphllm.output_formats.json_scanner import MAX_DEPTH
from tests.output_formats.replies import TOOLS, events_of, read, reply_of
from tests.output_formats.samples import SAMPLES, deepseek

# What comes first, and what is repeated behind it.
HOSTILE = {
    "pieces of a marker": ("hermes", "", "<tool_cal"),
    "markers": ("hermes", "", "<tool_call>"),
    "markers and brackets": ("hermes", "", "<tool_call>{"),
    "markers and lists": ("hermes", "", "<tool_call>[{"),
    "brackets in arguments": ("hermes", '<tool_call>{"name": "get_time", "arguments": {"a": ', "["),
    "brackets": ("generic", "", "["),
    "braces": ("generic", "", "{"),
    "brackets and braces": ("generic", "", '[{"a":'),
    "keys": ("generic", "", '{"name":'),
    "fences": ("generic", "", "```json\n"),
    "backticks": ("generic", "", "`"),
    "an object that is passed over": ("generic", '{"a": ', '{"b": "\\"'),
    "an endless string": ("hermes", '<tool_call>{"name": "get_time", "arguments": {"a": "', 'x\\"'),
    "an endless string before the name": ("hermes", '<tool_call>{"arguments": {"a": "', "x\\u00e9"),
    "an endless string that holds arguments": (
        "hermes",
        '<tool_call>{"name": "get_time", "arguments": "',
        "x",
    ),
    "an endless name": ("hermes", '<tool_call>{"name": "', "x"),
    "line breaks in a string": ("hermes", '<tool_call>{"name": "get_time", "arguments": {"a": "', "\n"),
    "an endless number": ("hermes", '<tool_call>{"name": "get_time", "arguments": {"a": ', "1"),
    "other values": ("hermes", '<tool_call>{"other": [', '{"a": 1},'),
    "blanks in a call": ("hermes", "<tool_call>", " \n"),
    "blanks": ("hermes", "x", " \n"),
    "blanks in reasoning": ("hermes", "<think>", " \n"),
    "reasoning": ("hermes", "<think>", "</thin"),
    "reasoning by turns": ("gpt_oss", "", "<|channel|>analysis<|message|>a<|end|>"),
    "headers": ("gpt_oss", "", "<|channel|>"),
    "recipients": ("gpt_oss", "", "<|start|>to="),
    "names": ("mistral", "", "[TOOL_CALLS]get_weather"),
    "python brackets": ("pythonic", "[get_weather(a=", "["),
    "python dictionaries": ("pythonic", "[get_weather(a=[", "{'a': [],}, "),
    "python quotes": ("pythonic", "[get_weather(a='''", "''\\x41"),
    "python lines": ("pythonic", "", "[get_weather(\n["),
    "a python name": ("pythonic", "[", "a."),
    "ends of values": ("glm", "<tool_call>get_weather<arg_key>city</arg_key><arg_value>", "</arg_valu"),
    "keys of values": ("glm", "<tool_call>get_weather", "<arg_key>"),
    "calls with keys without an end": ("glm", "", "<tool_call>get_weather<arg_key>"),
    "lines of values": ("qwen3_coder", "<function=get_weather><parameter=city>", "\n\n"),
    "sections": ("kimi", "", "<|tool_calls_section_begin|>"),
    "separators": ("deepseek_v3", deepseek("<|tool call begin|>"), deepseek("function<|tool sep|>")),
}


def seconds_of(name: str, text: str, size: int) -> float:
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    parser = find_format(name).parser(parses_tools=True, tools=TOOLS, parses_reasoning=True)
    start = time.process_time()
    for piece in pieces:
        parser.append(piece)
    parser.finish()
    return time.process_time() - start


@pytest.mark.parametrize("size", [5, 1_000_000], ids=["in pieces", "whole"])
@pytest.mark.parametrize("case", HOSTILE)
def test_time_is_linear(case: str, size: int) -> None:
    name, first, repeated = HOSTILE[case]
    num_chars = 5_000 if size == 5 else 20_000
    short, long = (first + repeated * (factor * num_chars // len(repeated)) for factor in (1, 8))
    # Quadratic time would be a ratio of 64. Small times are all noise.
    for _ in range(4):
        ratio = seconds_of(name, long, size) / max(seconds_of(name, short, size), 1e-3)
        if ratio < 20:
            break
    assert ratio < 20


@pytest.mark.parametrize("case", HOSTILE)
def test_long_hostile_text_says_the_same_in_pieces(case: str) -> None:
    name, first, repeated = HOSTILE[case]
    read(name, first + repeated * (2000 // len(repeated)))


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_thousands_of_calls_are_read(name: str) -> None:
    sample = next(sample for sample in SAMPLES[name].values() if len(sample.calls) == 1 and not sample.text)
    if name == "llama3_json":
        written = "; ".join([sample.written] * 3000)
    else:
        written = "\n".join([sample.written] * 3000)
    reply = reply_of(events_of(name, [written]))
    assert len(reply.calls) == 3000
    assert reply.text == ""


def test_brackets_too_deep_are_no_arguments() -> None:
    deep = "[" * MAX_DEPTH
    reply = read("hermes", f'<tool_call>{{"name": "get_time", "arguments": {{"a": {deep}')
    assert reply.calls[0].text == f'{{"a": {deep[1:]}'
    assert reply.text == "["


def test_python_brackets_too_deep_are_no_arguments() -> None:
    deep = "[" * (MAX_DEPTH + 1)
    reply = read("pythonic", f"[get_weather(a={deep}")
    assert reply.calls[0].text == f'{{"a": {deep[1:]}'
    assert reply.text == "["


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_plain_text_is_given_at_once(name: str) -> None:
    parser = find_format(name).parser(parses_tools=True, tools=TOOLS, parses_reasoning=True)
    for word in ("Hello", ", world", " is", " a", " text"):
        assert parser.append(word) == [TextDelta(word)]


@pytest.mark.parametrize("marker", ["<tool_call>", "<think>"])
def test_what_may_begin_a_marker_is_held_back_and_no_longer(marker: str) -> None:
    parser = find_format("hermes").parser(parses_tools=True, tools=TOOLS, parses_reasoning=True)
    for char in marker[:-1]:
        assert parser.append(char) == []
    assert parser.append("?") == [TextDelta(marker[:-1] + "?")]


def test_arguments_are_given_as_they_come() -> None:
    for name, first, rest in (
        ("hermes", '<tool_call>{"name": "get_weather", "arguments": ', ['{"city": ', '"Par', "is", '"}']),
        ("mistral", "[TOOL_CALLS]get_weather[ARGS]", ['{"city": ', '"Par', "is", '"}']),
        ("glm", "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>", ["Pa", "ri", "s"]),
        ("pythonic", "[get_weather(city=", ["'Par", "is", "'"]),
    ):
        parser = find_format(name).parser(parses_tools=True, tools=TOOLS, parses_reasoning=True)
        parser.append(first)
        for piece in rest:
            assert len(parser.append(piece)) >= 1, (name, piece)
