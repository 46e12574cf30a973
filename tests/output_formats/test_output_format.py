"""What is asked of a parser decides what it tells apart."""

from __future__ import annotations

import dataclasses

import pytest

from graphllm.output_formats import ToolCallArguments, find_format
from graphllm.output_formats.call_readers import MAX_NAME_CHARS
from tests.output_formats.replies import events_of, read, reply_of
from tests.output_formats.samples import SAMPLES, deepseek

CALL = '<tool_call>{"name": "get_time"}</tool_call>'


def test_reasoning_that_the_prompt_opened_needs_no_begin() -> None:
    reply = read("hermes", f"Hm.\n</think>\n\n{CALL}", starts_in_reasoning=True)
    assert (reply.reasoning, reply.text, len(reply.calls)) == ("Hm.", "", 1)


def test_reasoning_that_is_opened_twice_is_opened_once() -> None:
    reply = read("hermes", "\n<think>\nHm.</think>Yes", starts_in_reasoning=True)
    assert (reply.reasoning, reply.text) == ("Hm.", "Yes")


def test_reasoning_that_never_ends_is_all_reasoning() -> None:
    reply = read("hermes", f"Hm. {CALL} </thin", starts_in_reasoning=True)
    assert (reply.reasoning, reply.text, reply.calls) == (f"Hm. {CALL} </thin", "", [])


def test_empty_reasoning_is_none() -> None:
    reply = read("hermes", "<think>\n\n</think>\n\nYes\n")
    assert (reply.reasoning, reply.text) == ("", "Yes\n")


def test_reasoning_begins_a_reply_only() -> None:
    reply = read("hermes", "The tag <think> opens it, </think> closes it.")
    assert (reply.reasoning, reply.text) == ("", "The tag <think> opens it, </think> closes it.")


def test_reasoning_that_is_not_asked_for_is_text_without_calls() -> None:
    written = f"<think>{CALL}</think>\n\n"
    reply = read("hermes", written + CALL, parses_reasoning=False)
    assert (reply.reasoning, reply.text, len(reply.calls)) == ("", f"<think>{CALL}</think>", 1)


def test_reasoning_of_messages_that_is_not_asked_for_is_text() -> None:
    sample = SAMPLES["gpt_oss"]["reasoning before a call"]
    reply = read("gpt_oss", sample.written, parses_reasoning=False)
    assert reply.text == "<|channel|>analysis<|message|>We need to=functions.<|end|>"
    assert [(call.name, call.text) for call in reply.calls] == list(sample.calls)


def test_calls_that_are_not_asked_for_are_text() -> None:
    reply = read("hermes", f"<think>Hm</think>{CALL}", parses_tools=False)
    assert (reply.reasoning, reply.text, reply.calls) == ("Hm", CALL, [])


def test_any_name_may_be_called_where_no_tools_are_known() -> None:
    assert read("hermes", '<tool_call>{"name": "rm"}</tool_call>', tools=None).called == [("rm", {})]
    # Without a marker a name alone is no call then.
    assert read("generic", '{"name": "Bob"}', tools=None).text == '{"name": "Bob"}'
    assert read("generic", '{"name": "rm", "arguments": {}}', tools=None).called == [("rm", {})]


def test_a_call_that_is_cut_off_ends_with_what_came() -> None:
    events = events_of("hermes", ['<tool_call>{"name": "get_weather", "arguments": {"city": "Par'])
    reply = reply_of(events)
    assert (reply.calls[0].text, reply.text) == ('{"city": "Par', "")
    assert read("hermes", '<tool_call>{"name": "get_wea').text == '<tool_call>{"name": "get_wea'


def test_a_call_that_breaks_is_followed_by_text() -> None:
    reply = read("hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": Paris}}</tool_call>')
    assert (reply.calls[0].text, reply.text) == ('{"city": ', "Paris}}</tool_call>")


def test_arguments_that_hold_lone_surrogates_are_refused_when_unwrapped() -> None:
    written = '<tool_call>{"name": "get_time", "arguments": "{\\"a\\": \\"\\ud800\\"}"}</tool_call>'
    reply = read("hermes", written)
    assert reply.calls == []
    assert reply.text == written


def test_names_and_ids_that_utf_8_cannot_spell_are_refused() -> None:
    assert read("hermes", '<tool_call>{"name": "\\ud800"}', tools=None).calls == []
    reply = read("hermes", '<tool_call>{"id": "\\ud800", "name": "get_time"}</tool_call>')
    assert reply.calls[0].call_id is None


def test_pieces_of_arguments_are_never_empty() -> None:
    for name, samples in SAMPLES.items():
        for sample in samples.values():
            pieces = [e.text for e in events_of(name, sample.written) if isinstance(e, ToolCallArguments)]
            assert all(pieces)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_formats_are_values(name: str) -> None:
    output_format = find_format(name)
    assert hash(output_format) == hash(dataclasses.replace(output_format))
    with pytest.raises(dataclasses.FrozenInstanceError):
        output_format.name = "other"  # type: ignore[misc]


def test_markers_are_named_that_the_detokenizer_must_not_hide() -> None:
    assert find_format("llama3_json").marker_texts == {"<|python_tag|>"}
    assert {"[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"} <= find_format(
        "mistral"
    ).marker_texts
    assert {"<|start|>", "<|message|>", "<|call|>", "<|constrain|>"} <= find_format("gpt_oss").marker_texts
    assert deepseek("<|tool sep|>") in find_format("deepseek_v31").marker_texts
    assert {"<arg_key>", "</arg_value>", "<tool_call>", "</think>"} <= find_format("glm").marker_texts


def test_a_prompt_tells_whether_it_opens_reasoning() -> None:
    hermes = find_format("hermes")
    assert hermes.opens_reasoning("<|im_start|>assistant\n<think>\n")
    assert not hermes.opens_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not hermes.opens_reasoning("What does <think> mean?<|im_start|>assistant\n")
    assert not find_format("llama3_json").opens_reasoning("<think>")


def test_reasoning_ends_are_what_a_constraint_begins_behind() -> None:
    assert find_format("hermes").reasoning_ends == ("</think>",)
    assert find_format("gpt_oss").reasoning_ends == ("<|channel|>final<|message|>",)
    assert find_format("pythonic").reasoning_ends == ()


def test_a_key_too_long_for_a_call_ends_at_the_same_place_in_any_pieces() -> None:
    opening = '<tool_call>{"' + "x" * 300
    reply = read("hermes", opening + CALL)
    assert (reply.text, len(reply.calls)) == (opening, 1)


def test_a_name_too_long_for_a_call_is_text() -> None:
    for name, opening in (
        ("mistral", "[TOOL_CALLS]"),
        ("pythonic", "["),
        ("hermes", '<tool_call>{"name": "'),
        ("glm", "<tool_call>"),
    ):
        assert read(name, opening + "a" * 300 + "(", tools=None).text == opening + "a" * 300 + "("


def test_a_header_too_long_for_a_message_is_text() -> None:
    header = "<|channel|>" + "x" * 500
    reply = read("gpt_oss", f"{header}<|channel|>final<|message|>Yes")
    assert reply.text == f"{header}Yes"


def test_a_key_without_an_end_ends_the_call() -> None:
    reply = reply_of(events_of("glm", ["<tool_call>get_weather\n<arg_key>" + "k" * 300]))
    assert (len(reply.calls), reply.calls[0].text) == (1, "")
    assert reply.text == "k" * (300 - MAX_NAME_CHARS)
