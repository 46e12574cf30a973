"""What a model's template is given of a chat's messages, and what is refused or left out."""

from __future__ import annotations

from typing import Any

import pytest

from graphllm.errors import InvalidRequestError
from graphllm.server.generation.messages import TemplateFeatures, template_messages
from graphllm.tokenizer.chat_template import ChatTemplate
from tests.server.posting import PLAIN_TEMPLATE, RICH_TEMPLATE

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def features(template: str = PLAIN_TEMPLATE) -> TemplateFeatures:
    return TemplateFeatures.of(ChatTemplate(template, {}))


def rendered(*messages: dict[str, Any], template: str = PLAIN_TEMPLATE) -> list[dict[str, Any]]:
    return template_messages(messages, features(template))[0]


def test_a_template_is_read_for_what_it_knows() -> None:
    plain, rich = features(), features(RICH_TEMPLATE)
    assert not (plain.knows_tools or plain.knows_tool_calls or plain.knows_tool_role or plain.reads_name)
    assert rich.knows_tools and rich.knows_tool_calls and rich.knows_tool_role and rich.reads_name
    assert (plain.reasoning_keys, rich.reasoning_keys) == ((), ("reasoning_content",))
    assert plain.variables == {"messages", "add_generation_prompt"}
    assert rich.variables - plain.variables == {"tools", "documents", "enable_thinking"}


def test_a_variable_that_a_template_sets_if_it_was_not_given_is_one_it_reads() -> None:
    template = "{% if thinking is not defined %}{% set thinking = false %}{% endif %}{{ thinking }}"
    assert features(template).variables == {"thinking"}
    assert features("{% set thinking = false %}{{ thinking }}").variables == frozenset()


def test_developer_becomes_system_unless_the_template_knows_it() -> None:
    message = {"role": "developer", "content": "Be brief."}
    assert rendered(message)[0]["role"] == "system"
    assert rendered(message, template="{% if message.role == 'developer' %}{% endif %}")[0]["role"] == (
        "developer"
    )


def test_a_name_is_rendered_only_by_a_template_that_reads_it() -> None:
    message = {"role": "user", "content": "Hi", "name": "ann"}
    assert rendered(message, template=RICH_TEMPLATE)[0]["name"] == "ann"
    for template in (PLAIN_TEMPLATE, "{{ tool.function.name }}"):
        assert "name" not in rendered(message, template=template)[0]


def test_what_no_template_reads_is_left_out_with_one_warning_for_each_key() -> None:
    answer = {"role": "assistant", "content": "5", "name": "bob", "reasoning_content": "2+3"}
    messages = [{"role": "user", "content": "Hi", "name": "ann"}, answer, answer]
    _, warnings = template_messages(messages, features(PLAIN_TEMPLATE))
    assert [warning.field for warning in warnings] == ["messages[0].name", "messages[1].reasoning_content"]
    assert all("it was left out" in warning.message for warning in warnings)


def test_calls_and_results_reach_a_template_that_knows_them() -> None:
    assistant, tool = rendered(
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"},
        template=RICH_TEMPLATE,
    )
    assert assistant["tool_calls"] == [CALL]
    assert tool == {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"}


def test_calls_and_results_are_text_for_a_template_without_tools() -> None:
    assistant, by_name, by_id, bare = rendered(
        {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "add"},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
        {"role": "tool", "content": "2"},
    )
    line = '{"name":"add","arguments":{"a":1}}'
    assert assistant == {"role": "assistant", "content": f"Let me see.\n{line}\n{line}"}
    assert by_name == {"role": "user", "content": "Result of add:\n2"}
    assert by_id == {"role": "user", "content": "Result of c1:\n2"}
    assert bare == {"role": "user", "content": "Result:\n2"}


def test_earlier_reasoning_goes_to_templates_that_read_it_and_is_left_out_elsewhere() -> None:
    message = {"role": "assistant", "content": "4", "reasoning_content": "2+2"}
    kept, warnings = template_messages([message], features(RICH_TEMPLATE))
    assert kept[0]["reasoning_content"] == "2+2" and warnings == []
    kept, warnings = template_messages([message, message], features())
    assert kept[0] == {"role": "assistant", "content": "4"}
    # Once, however many messages there are.
    assert [warning.field for warning in warnings] == ["messages[0].reasoning_content"]


def test_earlier_reasoning_has_the_name_that_the_template_reads() -> None:
    message = {"role": "assistant", "content": "4", "reasoning_content": "2+2"}
    (kept,) = rendered(message, template="{{ message.thinking }}")
    assert kept == {"role": "assistant", "content": "4", "thinking": "2+2"}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "wizard", "content": "Hi"}, "messages[0].role"),
        ({"role": "user", "content": "x", "tool_call_id": "c"}, "messages[0].tool_call_id"),
    ],
)
def test_a_message_that_cannot_be_rendered_is_refused_by_its_path(
    message: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        rendered(message)
    assert caught.value.param == param


def test_no_messages_are_refused() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        rendered()
    assert caught.value.param == "messages"
