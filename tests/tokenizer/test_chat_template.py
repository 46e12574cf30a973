"""A template renders here as it does in transformers, and its failures are the request's."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from graphllm.errors import CheckpointError, ContextLengthError, InvalidRequestError
from graphllm.tokenizer.chat_template import ChatTemplate
from graphllm.tokenizer.tokenizer import Tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": 'Hi <b>& "you"</b> — naïve 你好'}
ASSISTANT = {"role": "assistant", "content": " Hello. "}
TURNS = [USER, ASSISTANT, {"role": "user", "content": "And?\n"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather <now> für Städte",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
TOOL_TURNS = [
    USER,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln"}}}
        ],
    },
    {"role": "tool", "name": "get_weather", "content": "17°"},
]

INST = """{%- if messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{{- bos_token -}}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- '[INST] ' + (system + '\\n\\n' if system is defined and loop.first else '') -}}
        {{- message['content'].strip() + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + message['content'] | trim + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""

CHATML_TOOLS = """{%- if tools %}
    <|system|>
    {%- for tool in tools %}
    {{ tool | tojson }}
    {{ tool.function | tojson(indent=2) }}
    {%- endfor %}
{% endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
    {%- if message.tool_calls is defined %}
        {%- for call in message.tool_calls %}
            {{- '<call>' ~ call.function.name ~ ' ' ~ (call.function.arguments | tojson) ~ '</call>' }}
        {%- endfor %}
        {%- continue %}
    {%- endif %}
    {%- if loop.index0 > 5 %}{% break %}{% endif %}
    {% if message.role == 'assistant' %}
        {% generation %}{% set x = 1 %}{{ message.content }}{% endgeneration %}
{{ x is defined }}
    {% else %}
<|{{ message.role }}|>{{ message['content'] }}
    {% endif %}
{%- endfor %}
{{ ns.last }}{% if add_generation_prompt %}<|assistant|>
{%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}
"""

MACROS = """{% macro turn(role, text) %}<{{ role }}>{{ text | upper }}
{{- caller() if caller else '' }}{% endmacro %}
{% for m in messages if m.role != 'tool' %}
  {{ turn(m.role, m.content) -}}
  {# a comment #}
  {{ loop.previtem.role if loop.previtem is defined }}{{ dict(a=1).get('a') }}{{ range(3) | list }}
{% endfor %}
{{ messages | map(attribute='role') | join(',') }}{{ unknown_name }}
{{ strftime_now('%Y') }}
"""


def theirs(
    backend: Backend, templates: str | dict[str, str], messages: list[dict[str, Any]], **options: Any
) -> str:
    """The same chat by transformers."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
    tokenizer.chat_template = templates
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert isinstance(rendered, str)
    return rendered


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (INST, TURNS),
        (INST, [{"role": "system", "content": "Be kind."}, *TURNS]),
        (CHATML_TOOLS, TURNS),
        (CHATML_TOOLS, TOOL_TURNS),
        (CHATML_TOOLS, TURNS * 3),
        (MACROS, TURNS),
        ({"default": INST, "tool_use": CHATML_TOOLS}, TURNS),
    ],
)
def test_chats_render_as_in_transformers(
    small_backend: Backend,
    template: str | dict[str, str],
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
) -> None:
    ours = ChatTemplate(template, SPECIAL).render(messages, add_generation_prompt=add_generation_prompt)
    assert ours == theirs(small_backend, template, messages, add_generation_prompt=add_generation_prompt)
    assert "Hi" in ours or "HI" in ours


def test_tools_and_keywords_render_as_in_transformers(small_backend: Backend) -> None:
    templates = {"default": INST, "tool_use": CHATML_TOOLS}
    for template in (CHATML_TOOLS, templates):
        ours = ChatTemplate(template, SPECIAL).render(
            TOOL_TURNS, tools=TOOLS, template_kwargs={"enable_thinking": False}
        )
        expected = theirs(
            small_backend,
            template,
            TOOL_TURNS,
            tools=TOOLS,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        assert ours == expected
        # HTML characters and letters beyond ASCII are written as they are.
        assert '"Weather <now> für Städte"' in ours and "<think></think>" in ours


@pytest.mark.parametrize("messages", [TURNS, [{"role": "system", "content": "Be kind."}, *TURNS]])
def test_demo_chats_render_as_in_transformers(
    demo: Tokenizer, small_backend: Backend, messages: list[dict[str, Any]]
) -> None:
    assert demo.chat_template is not None
    source = demo.chat_template.source
    expected = theirs(small_backend, source, messages, add_generation_prompt=True)
    assert demo.render_chat(messages) == expected


def test_clock_is_the_local_one() -> None:
    now = ChatTemplate("{{ strftime_now('%Y-%m') }}", {}).render([USER])
    assert now == datetime.now().strftime("%Y-%m")


def test_template_sees_only_the_special_tokens_the_model_has() -> None:
    template = ChatTemplate("{{ bos_token }}|{{ eos_token }}|{{ pad_token is defined }}", SPECIAL)
    assert template.render([USER]) == "<s>|</s>|False"


def test_keys_without_a_value_are_left_out() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m | length }}{{ m.content }}{% endfor %}", {})
    assert template.render([{"role": "assistant", "content": None, "name": None}]) == "1"


def test_templates_own_words_reach_the_user() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ChatTemplate(INST, SPECIAL).render([ASSISTANT])
    assert caught.value.message == "Roles must alternate user/assistant/user/assistant/..."
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages[0].content.name.first }}", "has no attribute 'name'"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages[5].role }}", "has no element 5"),
        ("{{ {'a': messages} | tojson(indent=messages) }}", "TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_failures_of_rendering_are_the_requests(template: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        ChatTemplate(template, {}).render([USER])
    assert caught.value.param == "messages"
    assert "chat template" in caught.value.message


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.items() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ range(100001) | length }}",
        "{{ '{0.__class__.__name__}'.format(1) }}",
    ],
)
def test_sandbox_keeps_templates_in(template: str) -> None:
    messages = [dict(USER)]
    with pytest.raises(InvalidRequestError):
        ChatTemplate(template, {}).render(messages)
    assert messages == [USER]


def test_output_is_bounded() -> None:
    template = ChatTemplate(
        "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}", {}
    )
    with pytest.raises(ContextLengthError, match="more than 1000 characters"):
        template.render([USER], max_chars=1000)
    assert ChatTemplate("{{ 'x' * 1000 }}", {}).render([USER], max_chars=1000) == "x" * 1000


def test_messages_may_not_be_empty() -> None:
    with pytest.raises(InvalidRequestError, match="empty"):
        ChatTemplate("x", {}).render([])


def test_named_templates_without_a_default_serve_tools_only() -> None:
    template = ChatTemplate({"tool_use": "tools", "rag": "rag"}, {})
    assert template.render([USER], tools=[]) == "tools"
    with pytest.raises(InvalidRequestError, match="rag, tool_use"):
        template.render([USER])


def test_template_that_is_not_jinja_is_refused_at_start() -> None:
    with pytest.raises(CheckpointError, match="line 2"):
        ChatTemplate("{{ 1 }}\n{% for %}", {})
    with pytest.raises(CheckpointError, match="no_such_filter"):
        ChatTemplate("{{ 1 | no_such_filter }}", {})
