"""From a chat to a prompt, to what its answer must look like, and to how it is read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from graphllm.outputs import FinishReason
from graphllm.server.generation.served_model import ServedModel
from tests.server.posting import PLAIN_TEMPLATE, RICH_TEMPLATE, USER, Posted, byte_tokenizer

RICH = byte_tokenizer(RICH_TEMPLATE)
THINKS = byte_tokenizer(PLAIN_TEMPLATE.replace("assistant\n", "assistant\n<think>\n"))
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How it is outside",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}


def rich(**fields: Any) -> Posted:
    return Posted("chat", tokenizer=RICH, **fields)


def message(posted: Posted) -> Any:
    return posted.json["choices"][0]["message"]


def warned(posted: Posted) -> list[str]:
    return [warning["field"] for warning in posted.json.get("warnings", [])]


# -- the prompt --------------------------------------------------------------------------------------


def test_a_plain_chat_is_rendered_and_opens_the_assistants_message() -> None:
    assert Posted().prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert Posted(add_generation_prompt=False).prompt == "<|im_start|>user\nHi<|im_end|>\n"


def test_the_final_message_is_continued_where_its_text_ends() -> None:
    messages = [*USER, {"role": "assistant", "content": "The answer <|im_end|> is "}]
    posted = Posted(messages=messages, continue_final_message=True)
    assert posted.prompt.endswith("<|im_start|>assistant\nThe answer <|im_end|> is ")


@pytest.mark.parametrize(
    "fields",
    [
        {"continue_final_message": True, "add_generation_prompt": True},
        {"continue_final_message": True, "messages": [{"role": "user", "content": ""}]},
    ],
)
def test_what_cannot_be_continued_is_refused(fields: dict[str, Any]) -> None:
    assert Posted(**fields).error["param"] == "continue_final_message"


def test_a_template_that_does_not_show_the_final_message_cannot_continue_it() -> None:
    posted = Posted(tokenizer=byte_tokenizer("{{ messages[0].role }}"), continue_final_message=True)
    assert posted.error["param"] == "continue_final_message"


def test_a_long_chat_is_refused_before_it_is_rendered_and_cut_where_that_is_asked_for() -> None:
    long = [{"role": "user", "content": "word " * 1000}]
    assert Posted(messages=long, max_model_len=100).error["code"] == "context_length_exceeded"
    many = [{"role": "user", "content": ""}] * 101
    assert Posted(messages=many, max_model_len=100).error["param"] == "messages"
    fields: dict[str, Any] = {"messages": long, "max_model_len": 9000, "truncate_prompt_tokens": 20}
    whole = Posted(messages=long, max_model_len=9000).submitted.prompt_token_ids
    assert Posted(**fields).submitted.prompt_token_ids == whole[-20:]
    first = Posted(**fields, truncation_side="right")
    assert first.submitted.prompt_token_ids == whole[:20]


def test_names_for_the_template_reach_it_and_others_are_warned_of() -> None:
    posted = rich(chat_template_kwargs={"enable_thinking": False, "colour": "red", "max_tokens": 5})
    assert posted.prompt.endswith("<think>\n\n</think>\n\n")
    assert warned(posted.answered("4")) == ["chat_template_kwargs.colour", "chat_template_kwargs.max_tokens"]


def test_names_that_are_the_servers_are_refused() -> None:
    for name in ("messages", "tools", "add_generation_prompt"):
        assert rich(chat_template_kwargs={name: []}).error["param"] == "chat_template_kwargs"


def test_documents_reach_a_template_that_reads_them_and_are_refused_elsewhere() -> None:
    documents = [{"title": "Rome", "text": "A city."}]
    assert '"title": "Rome"' in rich(documents=documents).prompt
    assert Posted(documents=documents).error["param"] == "documents"


@pytest.mark.parametrize(("effort", "is_closed"), [("none", True), ("low", False), ("max", False)])
def test_no_reasoning_effort_is_said_by_the_templates_switch(effort: str, is_closed: bool) -> None:
    posted = rich(reasoning_effort=effort)
    assert posted.prompt.endswith("</think>\n\n") is is_closed
    assert warned(posted.answered("4")) == []
    # The client's own names outrank what is derived.
    posted = rich(reasoning_effort="none", chat_template_kwargs={"enable_thinking": True})
    assert not posted.prompt.endswith("</think>\n\n")


def test_reasoning_effort_reaches_a_template_that_reads_it() -> None:
    tokenizer = byte_tokenizer("{{ reasoning_effort }}{{ messages[0].content }}")
    assert Posted(tokenizer=tokenizer, reasoning_effort="low").prompt == "lowHi"
    assert Posted(tokenizer=tokenizer, reasoning={"effort": "high"}).prompt == "highHi"


def test_reasoning_effort_that_nobody_reads_is_warned_of() -> None:
    assert warned(Posted(reasoning_effort="low").answered("4")) == ["reasoning_effort"]
    assert warned(Posted(reasoning={"enabled": True}).answered("4")) == ["reasoning"]
    assert Posted(reasoning_effort="huge").error["param"] == "reasoning_effort"


def test_a_model_without_a_template_has_no_chats() -> None:
    assert Posted(tokenizer=byte_tokenizer(None)).error["param"] == "messages"


# -- tools -------------------------------------------------------------------------------------------


def test_tools_are_shown_by_a_template_that_knows_them() -> None:
    prompt = rich(tools=[WEATHER, CLOCK]).prompt
    shown = json.loads(prompt.split("<|im_start|>tools\n")[1].split("<|im_end|>")[0])
    assert [tool["function"]["name"] for tool in shown] == ["weather", "clock"]
    assert shown[0] == WEATHER
    # Templates read `parameters` without asking whether there are any.
    assert shown[1]["function"]["parameters"] == {"type": "object", "properties": {}}


def test_tools_are_described_in_the_system_message_of_a_template_without_them() -> None:
    prompt = Posted(tools=[WEATHER]).prompt
    system, user = prompt.split("<|im_end|>\n")[:2]
    assert system.startswith("<|im_start|>system\n") and '"name":"weather"' in system
    assert '{"name": "<name of the function>", "arguments"' in system
    assert user == "<|im_start|>user\nHi"
    messages = [{"role": "system", "content": "Be brief."}, *USER]
    system = Posted(tools=[WEATHER], messages=messages).prompt.split("<|im_end|>\n")[0]
    assert system.startswith("<|im_start|>system\nBe brief.\n\n") and '"name":"weather"' in system


def test_tools_are_described_in_the_first_message_of_a_template_without_system_messages() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + PLAIN_TEMPLATE
    prompt = Posted(tools=[WEATHER], tokenizer=byte_tokenizer(template)).prompt
    assert prompt.startswith("<|im_start|>user\nYou can call") and "message.\n\nHi<|im_end|>" in prompt


def test_tools_that_may_not_be_called_are_not_shown() -> None:
    assert "weather" not in rich(tools=[WEATHER], tool_choice="none").prompt
    allowed = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "clock"}}]},
    }
    prompt = rich(tools=[WEATHER, CLOCK], tool_choice=allowed).prompt
    assert "clock" in prompt and "weather" not in prompt


def test_a_call_is_read_from_the_models_text() -> None:
    posted = rich(tools=[WEATHER]).answered(f"Let me see.\n{CALL}")
    (call,) = message(posted)["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
    assert call["id"].startswith("call_") and message(posted)["content"] == "Let me see."
    assert posted.json["choices"][0]["finish_reason"] == "tool_calls"


def test_a_call_of_the_generic_format_is_read_where_the_template_knows_none() -> None:
    posted = Posted(tools=[WEATHER]).answered('{"name": "weather", "arguments": {"city": "Rome"}}')
    (call,) = message(posted)["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert message(posted)["content"] is None


def test_a_call_of_what_is_no_tool_is_text() -> None:
    posted = rich(tools=[CLOCK]).answered(CALL)
    assert "tool_calls" not in message(posted) and message(posted)["content"] == CALL
    assert posted.json["choices"][0]["finish_reason"] == "stop"


def test_nothing_is_read_as_a_call_where_there_are_no_tools() -> None:
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        assert message(rich(**fields).answered(CALL))["content"] == CALL


def test_only_the_first_call_counts_where_one_is_allowed() -> None:
    both = rich(tools=[WEATHER]).answered(CALL + "\n" + CALL)
    assert len(message(both)["tool_calls"]) == 2
    one = rich(tools=[WEATHER], parallel_tool_calls=False).answered(CALL + "\n" + CALL)
    assert len(message(one)["tool_calls"]) == 1


def test_functions_and_calls_of_the_older_form() -> None:
    posted = rich(functions=[WEATHER["function"]]).answered(CALL)
    assert message(posted)["function_call"]["name"] == "weather"
    assert "tool_calls" not in message(posted)
    assert posted.json["choices"][0]["finish_reason"] == "function_call"
    assert rich(functions=[WEATHER["function"]], function_call="none").params.structured_outputs is None
    forced = rich(functions=[WEATHER["function"]], function_call={"name": "weather"})
    assert forced.params.structured_outputs is not None


def test_markers_that_are_special_tokens_reach_the_parser_and_others_stay_hidden() -> None:
    tokenizer = byte_tokenizer(RICH_TEMPLATE, special=("<tool_call>", "</tool_call>", "<other>"))
    posted = Posted("chat", tokenizer=tokenizer, tools=[WEATHER]).answered(f"a<other>b{CALL}")
    assert message(posted)["content"] == "ab" and len(message(posted)["tool_calls"]) == 1
    # Without tools they are as hidden as the others.
    assert Posted("chat", tokenizer=tokenizer).params.shown_special_token_ids == frozenset()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "some", "tools": [WEATHER]}, "tool_choice"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": [WEATHER]},
            "tool_choice",
        ),
        ({"tool_choice": {"type": "function"}, "tools": [WEATHER]}, "tool_choice"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [CLOCK] * 513}, "tools"),
        ({"functions": [{"name": "f"}], "tools": [WEATHER]}, "functions"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call"),
        ({"functions": [{"name": "f"}], "function_call": "required"}, "function_call"),
        ({"function_call": "auto"}, "function_call"),
    ],
)
def test_tools_that_cannot_be_are_refused(fields: dict[str, Any], param: str) -> None:
    assert rich(**fields).error["param"] == param


# -- what the answer must look like --------------------------------------------------------------------


def test_a_required_call_is_enforced_in_the_models_format() -> None:
    posted = rich(tools=[WEATHER, CLOCK], tool_choice="required", reasoning_effort="none")
    wanted = posted.params.structured_outputs
    assert wanted is not None and wanted.grammar is not None and wanted.starts_after == ()
    assert "weather" in wanted.grammar and "clock" in wanted.grammar and "<tool_call>" in wanted.grammar
    # Both are shown, because they explain each other, also where one is enforced.
    named = {"type": "function", "function": {"name": "clock"}}
    posted = rich(tools=[WEATHER, CLOCK], tool_choice=named, reasoning_effort="none")
    wanted = posted.params.structured_outputs
    assert wanted is not None and wanted.grammar is not None
    assert "weather" not in wanted.grammar and "weather" in posted.prompt


def test_a_required_call_begins_behind_the_reasoning() -> None:
    wanted = rich(tools=[WEATHER], tool_choice="required").params.structured_outputs
    assert wanted is not None and wanted.starts_after == ("</think>",)


def test_an_enforced_form_begins_behind_reasoning_that_the_template_opened() -> None:
    posted = Posted(tokenizer=THINKS, response_format=FORM)
    wanted = posted.params.structured_outputs
    assert wanted is not None and wanted.starts_after == ("</think>",) and wanted.kind == "json"
    posted.answered('two\n</think>\n\n{"a": 2}')
    assert message(posted)["content"] == '{"a": 2}' and message(posted)["reasoning_content"] == "two"


def test_an_enforced_form_opens_the_reasoning_that_a_model_would_open_itself() -> None:
    posted = rich(response_format=FORM)
    assert posted.prompt.endswith("assistant\n<think>\n")
    assert posted.params.structured_outputs is not None
    assert posted.params.structured_outputs.starts_after == ("</think>",)
    # Without a form the model does as it likes.
    assert rich().prompt.endswith("assistant\n")


def test_an_enforced_form_begins_at_once_where_there_is_no_reasoning() -> None:
    for posted in (Posted(response_format=FORM), rich(response_format=FORM, reasoning_effort="none")):
        assert posted.params.structured_outputs is not None
        assert posted.params.structured_outputs.starts_after == ()
        assert not posted.prompt.endswith("<think>\n")


def test_a_form_beside_tools_is_warned_of() -> None:
    grammar = {"grammar": 'start: "a"'}
    assert warned(rich(tools=[WEATHER], structured_outputs=grammar).answered("a")) == ["tools"]
    both = rich(tools=[WEATHER], tool_choice="required", response_format=FORM)
    assert warned(both.answered(CALL)) == ["response_format"]
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    assert warned(rich(tools=[strict]).answered(CALL)) == ["tools"]
    assert warned(rich(tools=[strict], tool_choice="required").answered(CALL)) == []


# -- reasoning -----------------------------------------------------------------------------------------

REASONED = "<think>\ntwo and two\n</think>\n\nFour."


def test_reasoning_is_told_apart_from_the_answer() -> None:
    posted = rich().answered(REASONED)
    assert message(posted)["content"] == "Four."
    assert message(posted)["reasoning_content"] == message(posted)["reasoning"] == "two and two"
    usage = posted.json["usage"]
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < usage["completion_tokens"]


def test_reasoning_that_the_template_opened_is_reasoning_from_the_start() -> None:
    posted = Posted(tokenizer=THINKS).answered("two and two</think>Four.")
    assert (message(posted)["content"], message(posted)["reasoning"]) == ("Four.", "two and two")


def test_reasoning_is_left_in_the_text_or_out_of_the_answer_where_that_is_asked_for() -> None:
    left = message(rich(separate_reasoning=False).answered(REASONED))
    assert left["content"] == REASONED and "reasoning" not in left
    for fields in ({"include_reasoning": False}, {"reasoning": {"exclude": True}}):
        out = message(rich(**fields).answered(REASONED))
        assert out["content"] == "Four." and "reasoning" not in out


def test_reasoning_comes_in_one_piece_where_that_is_asked_for() -> None:
    def pieces(**fields: Any) -> list[str]:
        posted = rich(stream=True, **fields).answered(REASONED)
        deltas = [event["choices"][0]["delta"] for event in posted.events]
        return [delta["reasoning"] for delta in deltas if "reasoning" in delta]

    assert pieces(stream_reasoning=False) == ["two and two"]
    assert len(pieces()) > 3 and "".join(pieces()) == "two and two"


def test_reasoning_that_was_cut_off_is_not_lost_in_one_piece() -> None:
    posted = rich(stream=True, stream_reasoning=False)
    posted.say("<think>two and", finish=FinishReason.LENGTH).end()
    assert posted.events[-2]["choices"][0]["delta"]["reasoning"] == "two and"


# -- which format --------------------------------------------------------------------------------------


def test_formats_are_guessed_or_named() -> None:
    def served(engine: Any) -> ServedModel:
        return ServedModel(engine, "m", tool_call_parser="mistral", reasoning_parser="none")

    assert "tool_calls" in message(rich(tools=[WEATHER]).answered(CALL))
    posted = rich(tools=[WEATHER], served=served).answered(CALL)
    assert message(posted)["content"] == CALL
    call = '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}]'
    posted = rich(tools=[WEATHER], served=served).answered(call)
    assert message(posted)["tool_calls"][0]["function"]["name"] == "weather"
    assert message(rich(served=served).answered(REASONED))["content"] == REASONED
