"""Replies as the model families write them, format by format: the samples that several tests read.

The syntax is that of the families' chat templates, which write the calls of earlier turns so.
"""

from __future__ import annotations

from dataclasses import dataclass

BAR, BLANK = "\uff5c", "\u2581"


def deepseek(text: str) -> str:
    """DeepSeek's tokens, written here as `<|tool calls begin|>`."""
    for words in ("tool calls begin", "tool calls end", "tool call begin", "tool call end", "tool sep"):
        text = text.replace(f"<|{words}|>", f"<{BAR}{words.replace(' ', BLANK)}{BAR}>")
    return text


@dataclass(frozen=True)
class Sample:
    """What a model wrote, and what it means. text: the answer. arguments: exactly, as JSON text."""

    written: str
    calls: tuple[tuple[str, str], ...] = ()
    text: str = ""
    reasoning: str = ""
    call_ids: tuple[str, ...] = ()


NESTED = (
    '{"city": "Köln \\"am\\" Rhein\\n\\u00e9 \\ud83d\\ude00", '
    '"where": {"at": [1, -2.5e3, {"x": null}]}, "tags": []}'
)
PARIS = '{"city": "Paris"}'

HERMES = {
    "one call": Sample(
        f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>',
        (("get_weather", PARIS),),
    ),
    "parallel calls": Sample(
        f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>',
        (("get_weather", PARIS), ("get_time", "{}")),
    ),
    "text and a call": Sample(
        f'I\'ll look it up.\n\n<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>\n',
        (("get_weather", PARIS),),
        text="I'll look it up.",
    ),
    "text on both sides": Sample(
        'One\n<tool_call>{"name": "get_time"}</tool_call>\nTwo ', (("get_time", "{}"),), text="One\nTwo "
    ),
    "text behind a call": Sample(
        '<tool_call>{"name": "get_time"}</tool_call>\nTwo ', (("get_time", "{}"),), text="Two "
    ),
    "no arguments": Sample('<tool_call>\n{"name": "get_time"}\n</tool_call>', (("get_time", "{}"),)),
    "null arguments": Sample(
        '<tool_call>{"name": "get_time", "arguments": null}</tool_call>', (("get_time", "{}"),)
    ),
    "nested arguments": Sample(
        f'<tool_call>\n{{"name": "get_weather", "arguments": {NESTED}}}\n</tool_call>',
        (("get_weather", NESTED),),
    ),
    "reasoning before a call": Sample(
        f'<think>\nThe <tool_call> is "hard".\n</think>\n\n'
        f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>',
        (("get_weather", PARIS),),
        reasoning='The <tool_call> is "hard".',
    ),
    "arguments before the name": Sample(
        f'<tool_call>{{"arguments": {PARIS}, "name": "get_weather"}}</tool_call>', (("get_weather", PARIS),)
    ),
    "arguments encoded twice": Sample(
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>',
        (("get_weather", PARIS),),
    ),
    "a list of calls": Sample(
        f'<tool_call>[{{"name": "get_weather", "arguments": {PARIS}}}, {{"name": "get_time"}}]</tool_call>',
        (("get_weather", PARIS), ("get_time", "{}")),
    ),
    "other keys": Sample(
        '<tool_call>{"id": "call_7", "type": {"a": [1]}, "name": "get_time"}</tool_call>',
        (("get_time", "{}"),),
        call_ids=("call_7",),
    ),
    "a line break in a string": Sample(
        '<tool_call>{"name": "run.code", "arguments": {"code": "a\n\tb"}}</tool_call>',
        (("run.code", '{"code": "a\\n\\tb"}'),),
    ),
    "the marker in a string": Sample(
        '<tool_call>{"name": "run.code", "arguments": {"code": "</tool_call><tool_call>"}}</tool_call>',
        (("run.code", '{"code": "</tool_call><tool_call>"}'),),
    ),
    "no end marker": Sample('<tool_call>{"name": "get_time"}\nWell.', (("get_time", "{}"),), text="Well."),
    "an unknown tool": Sample(
        '<tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call>',
        text='<tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call>',
    ),
    "broken before the name": Sample(
        '<tool_call>\n{"name": get_time}\n</tool_call> ok',
        text='<tool_call>\n{"name": get_time}\n</tool_call> ok',
    ),
    "arguments that are no object": Sample(
        '<tool_call>{"name": "get_time", "arguments": [1]}</tool_call>',
        text='<tool_call>{"name": "get_time", "arguments": [1]}</tool_call>',
    ),
    "a marker and nothing else": Sample("<tool_call>", text="<tool_call>"),
    "half a marker": Sample("a <tool_ca", text="a <tool_ca"),
    "a call behind a broken one": Sample(
        '<tool_call>{"x<tool_call>{"name": "get_time"}</tool_call>',
        text='<tool_call>{"x<tool_call>{"name": "get_time"}</tool_call>',
    ),
    "a call behind a marker": Sample(
        '<tool_call>\n<tool_call>{"name": "get_time"}</tool_call>', (("get_time", "{}"),), text="<tool_call>"
    ),
}

LLAMA3_JSON = {
    "one call": Sample(f'{{"name": "get_weather", "parameters": {PARIS}}}', (("get_weather", PARIS),)),
    "behind the tag": Sample(
        f'<|python_tag|>{{"name": "get_weather", "parameters": {PARIS}}}', (("get_weather", PARIS),)
    ),
    "the type first": Sample(
        f'{{"type": "function", "name": "get_weather", "parameters": {PARIS}}}', (("get_weather", PARIS),)
    ),
    "parallel calls": Sample(
        f'<|python_tag|>{{"name": "get_weather", "parameters": {PARIS}}}; '
        '{"name": "get_time", "parameters": {}}',
        (("get_weather", PARIS), ("get_time", "{}")),
    ),
    "parallel calls on lines": Sample(
        f'{{"name": "get_weather", "parameters": {PARIS}}}\n{{"name": "get_time", "parameters": {{}}}}',
        (("get_weather", PARIS), ("get_time", "{}")),
    ),
    "text and a call": Sample(
        'Well: <|python_tag|>{"name": "get_time", "parameters": {}}', (("get_time", "{}"),), text="Well:"
    ),
    "no arguments": Sample('{"name": "get_time", "parameters": {}}', (("get_time", "{}"),)),
    "nested arguments": Sample(
        f'{{"name": "get_weather", "parameters": {NESTED}}}', (("get_weather", NESTED),)
    ),
    "an answer in JSON": Sample('{"city": "Paris", "x": [1]}', text='{"city": "Paris", "x": [1]}'),
    "a call inside JSON that is none": Sample(
        '{"calls": {"name": "get_time", "parameters": {}}}',
        text='{"calls": {"name": "get_time", "parameters": {}}}',
    ),
    "JSON later in the text": Sample(
        'So {"name": "get_time", "parameters": {}}', text='So {"name": "get_time", "parameters": {}}'
    ),
    "an unknown tool": Sample(
        '{"name": "rm", "parameters": {"name": "get_time"}} {"name": "get_time"}',
        text='{"name": "rm", "parameters": {"name": "get_time"}} {"name": "get_time"}',
    ),
    "a built-in tool": Sample(
        '<|python_tag|>brave_search.call(query="x")', text='<|python_tag|>brave_search.call(query="x")'
    ),
}

MISTRAL = {
    "one call": Sample(
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {PARIS}}}]', (("get_weather", PARIS),)
    ),
    "parallel calls": Sample(
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}, '
        '{"name": "get_time", "arguments": {}}]',
        (("get_weather", PARIS), ("get_time", "{}")),
    ),
    "with an id": Sample(
        '[TOOL_CALLS][{"id": "a1b2c3d4e", "name": "get_time", "arguments": {}}]',
        (("get_time", "{}"),),
        call_ids=("a1b2c3d4e",),
    ),
    "by name": Sample(f"[TOOL_CALLS]get_weather[ARGS]{PARIS}", (("get_weather", PARIS),)),
    "by name, parallel": Sample(
        f"[TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]get_time[ARGS]{{}}",
        (("get_weather", PARIS), ("get_time", "{}")),
    ),
    "by name without a marker": Sample(f"[TOOL_CALLS]get_weather{PARIS}", (("get_weather", PARIS),)),
    "by name with an id": Sample(
        f"[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{PARIS}",
        (("get_weather", PARIS),),
        call_ids=("a1b2c3d4e",),
    ),
    "text and a call": Sample(
        f"Let me see.[TOOL_CALLS]get_weather[ARGS]{PARIS}", (("get_weather", PARIS),), text="Let me see."
    ),
    "no arguments": Sample("[TOOL_CALLS]get_time[ARGS]{}", (("get_time", "{}"),)),
    "nested arguments": Sample(f"[TOOL_CALLS]get_weather[ARGS]{NESTED}", (("get_weather", NESTED),)),
    "reasoning before a call": Sample(
        "[THINK]Hm [1].[/THINK][TOOL_CALLS]get_time[ARGS]{}", (("get_time", "{}"),), reasoning="Hm [1]."
    ),
    "text behind a list": Sample(
        '[TOOL_CALLS][{"name": "get_time"}], {"name": "get_time"}',
        (("get_time", "{}"),),
        text=', {"name": "get_time"}',
    ),
    "an unknown tool": Sample("[TOOL_CALLS]rm[ARGS]{}", text="[TOOL_CALLS]rm[ARGS]{}"),
    "arguments that are no object": Sample(
        "[TOOL_CALLS]get_time[ARGS]12", text="[TOOL_CALLS]get_time[ARGS]12"
    ),
}

PYTHONIC = {
    "one call": Sample("[get_weather(city='Paris')]", (("get_weather", PARIS),)),
    "between markers": Sample(
        '<|python_start|>[get_weather(city="Paris")]<|python_end|>', (("get_weather", PARIS),)
    ),
    "parallel calls": Sample(
        "[get_weather(city='Paris'), get_time()]", (("get_weather", PARIS), ("get_time", "{}"))
    ),
    "text and a call": Sample("Sure:\n[get_time()]", (("get_time", "{}"),), text="Sure:"),
    "no arguments": Sample("[get_time()]", (("get_time", "{}"),)),
    "a name with a dot": Sample("[run.code(code='x')]", (("run.code", '{"code": "x"}'),)),
    "literals": Sample(
        "[run.code(a=True, b=None, c=-1.5e3, d=0x1f, e=1_000, f=.5, g=2., h=false)]",
        (
            (
                "run.code",
                '{"a": true, "b": null, "c": -1.5e3, "d": 31, "e": 1000, "f": 0.5, "g": 2.0, "h": false}',
            ),
        ),
    ),
    "nested arguments": Sample(
        "[run.code(a=[1, (2, 3,), {'k': {}, \"l\": []}], b={'x': 'y',},)]",
        (("run.code", '{"a": [1, [2, 3], {"k": {}, "l": []}], "b": {"x": "y"}}'),),
    ),
    "strings": Sample(
        r"""[run.code(a='it\'s "é"', b="\x41\u00e9\U0001f600\101\n\/\q", c='''x'y''z''', d='')]""",
        (("run.code", '{"a": "it\'s \\"é\\"", "b": "Aé😀A\\n/\\\\q", "c": "x\'y\'\'z", "d": ""}'),),
    ),
    "a pair of surrogates": Sample(
        r"[run.code(a='\ud83d\ude00')]", (("run.code", '{"a": "\\ud83d\\ude00"}'),)
    ),
    "a link": Sample("[Paris](https://example.org)", text="[Paris](https://example.org)"),
    "in the middle of a line": Sample("So [get_time()]", text="So [get_time()]"),
    "an unknown tool": Sample("[rm(path='/')]", text="[rm(path='/')]"),
    "positional arguments": Sample("[get_weather('Paris')]", text="[get_weather('Paris')]"),
    "an empty list": Sample("[]", text="[]"),
}

DEEPSEEK_V3 = {
    "one call": Sample(
        deepseek(
            "<|tool calls begin|><|tool call begin|>function<|tool sep|>get_weather\n"
            f"```json\n{PARIS}\n```<|tool call end|><|tool calls end|>"
        ),
        (("get_weather", PARIS),),
    ),
    "parallel calls": Sample(
        deepseek(
            "<|tool calls begin|><|tool call begin|>function<|tool sep|>get_weather\n"
            f"```json\n{PARIS}\n```<|tool call end|>\n"
            "<|tool call begin|>function<|tool sep|>get_time\n```json\n{}\n```<|tool call end|>"
            "<|tool calls end|>"
        ),
        (("get_weather", PARIS), ("get_time", "{}")),
    ),
    "reasoning and text": Sample(
        deepseek(
            "<think>\nHm\n</think>\n\nLet me see.<|tool calls begin|><|tool call begin|>function<|tool sep|>"
            f"get_weather\n```json\n{NESTED}\n```<|tool call end|><|tool calls end|>"
        ),
        (("get_weather", NESTED),),
        text="Let me see.",
        reasoning="Hm",
    ),
    "without the outer marker": Sample(
        deepseek("<|tool call begin|>function<|tool sep|>get_time\n```json\n{}\n```<|tool call end|>"),
        (("get_time", "{}"),),
    ),
    "an unknown tool": Sample(
        deepseek("<|tool calls begin|><|tool call begin|>function<|tool sep|>rm\n```json\n{}\n```"),
        text=deepseek("<|tool calls begin|><|tool call begin|>function<|tool sep|>rm\n```json\n{}\n```"),
    ),
}

DEEPSEEK_V31 = {
    "one call": Sample(
        deepseek(
            f"<|tool calls begin|><|tool call begin|>get_weather<|tool sep|>{PARIS}<|tool call end|>"
            "<|tool calls end|>"
        ),
        (("get_weather", PARIS),),
    ),
    "parallel calls": Sample(
        deepseek(
            f"<|tool calls begin|><|tool call begin|>get_weather<|tool sep|>{PARIS}<|tool call end|>"
            "<|tool call begin|>get_time<|tool sep|>{}<|tool call end|><|tool calls end|>"
        ),
        (("get_weather", PARIS), ("get_time", "{}")),
    ),
    "text and a call": Sample(
        deepseek(
            f"Ok. <|tool calls begin|><|tool call begin|>get_weather<|tool sep|>{NESTED}<|tool call end|>"
        ),
        (("get_weather", NESTED),),
        text="Ok.",
    ),
    "no arguments": Sample(
        deepseek("<|tool calls begin|><|tool call begin|>get_time<|tool sep|><|tool call end|>"),
        (("get_time", "{}"),),
    ),
    "as V3 writes": Sample(DEEPSEEK_V3["one call"].written, DEEPSEEK_V3["one call"].calls),
    "reasoning before a call": Sample(
        deepseek("<think>a</think><|tool calls begin|><|tool call begin|>get_time<|tool sep|>{}"),
        (("get_time", "{}"),),
        reasoning="a",
    ),
}

GLM = {
    "one call": Sample(
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>",
        (("get_weather", PARIS),),
    ),
    "without line breaks": Sample(
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>",
        (("get_weather", PARIS),),
    ),
    "parallel calls": Sample(
        "\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>\n"
        "<tool_call>get_time\n</tool_call>",
        (("get_weather", PARIS), ("get_time", "{}")),
    ),
    "text and reasoning": Sample(
        "\n<think>Hm</think>\nOk.\n<tool_call>get_time</tool_call>",
        (("get_time", "{}"),),
        text="Ok.",
        reasoning="Hm",
    ),
    "types by schema": Sample(
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>12</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>12</arg_value>\n<arg_key>metric</arg_key>\n"
        '<arg_value>true</arg_value>\n<arg_key>tags</arg_key>\n<arg_value>["a", "b"]</arg_value>\n'
        "<arg_key>note</arg_key>\n<arg_value>null</arg_value>\n"
        "<arg_key>other</arg_key>\n<arg_value>1.5</arg_value>\n</tool_call>",
        (
            (
                "get_weather",
                '{"city": "12", "days": 12, "metric": true, "tags": ["a", "b"], "note": null, "other": 1.5}',
            ),
        ),
    ),
    "strings as they are": Sample(
        '<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value> "a"\n\\n <b></arg_valu> </arg_value>\n'
        "</tool_call>",
        (("get_weather", '{"city": " \\"a\\"\\n\\\\n <b></arg_valu> "}'),),
    ),
    "no tool": Sample("<tool_call>rm\n</tool_call>", text="<tool_call>rm\n</tool_call>"),
}

KIMI = {
    "one call": Sample(
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        f"{PARIS}<|tool_call_end|><|tool_calls_section_end|>",
        (("get_weather", PARIS),),
        call_ids=("functions.get_weather:0",),
    ),
    "parallel calls": Sample(
        "Ok.<|tool_calls_section_begin|>"
        f"<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{PARIS}<|tool_call_end|>"
        "<|tool_call_begin|>functions.get_time:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        (("get_weather", PARIS), ("get_time", "{}")),
        text="Ok.",
        call_ids=("functions.get_weather:0", "functions.get_time:1"),
    ),
    "blanks and a name with a dot": Sample(
        "<|tool_calls_section_begin|> <|tool_call_begin|> run.code:12 <|tool_call_argument_begin|> {} "
        "<|tool_call_end|>\n<|tool_calls_section_end|>",
        (("run.code", "{}"),),
        call_ids=("run.code:12",),
    ),
    "out of reasoning": Sample(
        "<think>Hm. <|tool_calls_section_begin|><|tool_call_begin|>get_time:0<|tool_call_argument_begin|>{}",
        (("get_time", "{}"),),
        reasoning="Hm.",
        call_ids=("get_time:0",),
    ),
    "nested arguments": Sample(
        f"<|tool_calls_section_begin|><|tool_call_begin|>get_weather:3<|tool_call_argument_begin|>{NESTED}",
        (("get_weather", NESTED),),
        call_ids=("get_weather:3",),
    ),
    "no arguments": Sample(
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_time:0<|tool_call_argument_begin|>"
        "<|tool_call_end|><|tool_calls_section_end|>",
        (("get_time", "{}"),),
        call_ids=("functions.get_time:0",),
    ),
    "an unknown tool": Sample(
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.rm:0<|tool_call_argument_begin|>{}",
        text="<|tool_calls_section_begin|><|tool_call_begin|>functions.rm:0<|tool_call_argument_begin|>{}",
    ),
}

GPT_OSS = {
    "one call": Sample(
        "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>" + PARIS + "<|call|>",
        (("get_weather", PARIS),),
    ),
    "reasoning before a call": Sample(
        "<|channel|>analysis<|message|>We need to=functions.<|end|><|start|>assistant<|channel|>commentary "
        f"to=functions.get_weather <|constrain|>json<|message|>{NESTED}<|call|>",
        (("get_weather", NESTED),),
        reasoning="We need to=functions.",
    ),
    "the recipient before the channel": Sample(
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant to=functions.get_time"
        "<|channel|>commentary json<|message|>{}<|call|>",
        (("get_time", "{}"),),
        reasoning="Hm",
    ),
    "the recipient first of all": Sample(
        " to=functions.get_time<|channel|>commentary<|message|>{}<|call|>", (("get_time", "{}"),)
    ),
    "parallel calls": Sample(
        f"<|channel|>commentary to=functions.get_weather<|message|>{PARIS}<|call|><|start|>assistant"
        "<|channel|>commentary to=functions.get_time<|message|><|call|>",
        (("get_weather", PARIS), ("get_time", "{}")),
    ),
    "an answer": Sample(
        "<|channel|>analysis<|message|>Hm\n<|end|><|start|>assistant<|channel|>final<|message|> 4 <5.\n"
        "<|return|>",
        text=" 4 <5.\n",
        reasoning="Hm",
    ),
    "text and a call": Sample(
        "<|channel|>commentary<|message|>I'll look.<|end|><|start|>assistant<|channel|>commentary "
        "to=functions.get_time <|constrain|>json<|message|>{}<|call|>",
        (("get_time", "{}"),),
        text="I'll look.",
    ),
    "reasoning in two parts": Sample(
        "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>analysis<|message|>B<|end|>",
        reasoning="A\nB",
    ),
    "an unknown tool": Sample(
        '<|channel|>commentary to=functions.rm <|constrain|>json<|message|>{"a": 1}<|call|>',
        text='<|channel|>commentary to=functions.rm <|constrain|>json<|message|>{"a": 1}<|call|>',
    ),
    "arguments that are no object": Sample(
        "<|channel|>commentary to=functions.get_time<|message|>[1]<|call|>",
        text="<|channel|>commentary to=functions.get_time<|message|>[1]",
    ),
    "no messages": Sample("Just text to=x.", text="Just text to=x."),
    "a header without an end": Sample("<|channel|>analysis", text="<|channel|>analysis"),
}

QWEN3_CODER = {
    "one call": Sample(
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
        (("get_weather", PARIS),),
    ),
    "parallel calls": Sample(
        "Ok\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n"
        "</tool_call>\n<tool_call>\n<function=get_time>\n</function>\n</tool_call>",
        (("get_weather", PARIS), ("get_time", "{}")),
        text="Ok",
    ),
    "without the outer markers": Sample(
        "<function=get_weather><parameter=city>Paris</parameter></function>", (("get_weather", PARIS),)
    ),
    "lines": Sample(
        "<tool_call>\n<function=run.code>\n<parameter=code>\n\n  if a < b:\n    '</p>'\n\n</parameter>\n"
        "<parameter=n>\n3\n</parameter>\n</function>\n</tool_call>",
        (("run.code", '{"code": "\\n  if a < b:\\n    \'</p>\'\\n", "n": 3}'),),
    ),
    "string lines": Sample(
        "<tool_call><function=get_weather><parameter=city>\n\nA\n\n</parameter><parameter=metric>\nTrue\n"
        "</parameter><parameter=days>\nmany\n</parameter></function></tool_call>",
        (("get_weather", '{"city": "\\nA\\n", "metric": true, "days": "many"}'),),
    ),
    "reasoning before a call": Sample(
        "<think>\nHm\n</think>\n<tool_call><function=get_time></function></tool_call>",
        (("get_time", "{}"),),
        reasoning="Hm",
    ),
    "an unknown tool": Sample(
        "<tool_call>\n<function=rm>\n</function>\n</tool_call>",
        text="<tool_call>\n<function=rm>\n</function>\n</tool_call>",
    ),
    "no call inside": Sample("<tool_call>\nHello", text="<tool_call>\nHello"),
}

GENERIC = {
    "one call": Sample(f'{{"name": "get_weather", "arguments": {PARIS}}}', (("get_weather", PARIS),)),
    "in a fence": Sample(
        f'Sure:\n```json\n{{"name": "get_weather", "arguments": {PARIS}}}\n```\nDone.',
        (("get_weather", PARIS),),
        text="Sure:\nDone.",
    ),
    "in a bare fence": Sample('```\n{"name": "get_time"}\n```', (("get_time", "{}"),)),
    "in tags": Sample('<tool_call>\n{"name": "get_time"}\n</tool_call>', (("get_time", "{}"),)),
    "parallel calls": Sample(
        f'[{{"name": "get_weather", "arguments": {PARIS}}}, {{"name": "get_time", "arguments": {{}}}}]',
        (("get_weather", PARIS), ("get_time", "{}")),
    ),
    "calls on lines": Sample(
        f'{{"name": "get_weather", "arguments": {PARIS}}}\n{{"name": "get_time", "arguments": {{}}}}',
        (("get_weather", PARIS), ("get_time", "{}")),
    ),
    "as the API has them": Sample(
        '{"id": "call_1", "type": "function", "function": {"name": "get_weather", '
        '"arguments": "{\\"city\\": \\"Paris\\"}"}}',
        (("get_weather", PARIS),),
        call_ids=("call_1",),
    ),
    "the function as the name": Sample(
        f'{{"function": "get_weather", "parameters": {PARIS}}}', (("get_weather", PARIS),)
    ),
    "text and a call": Sample('I call {"name": "get_time"} now.', (("get_time", "{}"),), text="I call now."),
    "nested arguments": Sample(
        f'{{"name": "get_weather", "arguments": {NESTED}}}', (("get_weather", NESTED),)
    ),
    "other JSON": Sample(
        'A set {1, 2} and {"name": "Bob", "age": {"name": "get_time"}}.',
        text='A set {1, 2} and {"name": "Bob", "age": {"name": "get_time"}}.',
    ),
    "code": Sample(
        "```python\nx = {'a': [1]}\n```\n```json\n{\"a\": 1}\n```",
        text="```python\nx = {'a': [1]}\n```\n```json\n{\"a\": 1}\n```",
    ),
    "a call behind other JSON": Sample(
        '{"a": "}"} {"name": "get_time"}', (("get_time", "{}"),), text='{"a": "}"}'
    ),
}


def _in_lists(begin: str, end: str) -> dict[str, Sample]:
    weather = f'{{"name": "get_weather", "arguments": {PARIS}}}'
    return {
        "one call": Sample(f"{begin}[{weather}]{end}", (("get_weather", PARIS),)),
        "parallel calls": Sample(
            f'{begin}[{weather}, {{"name": "get_time", "arguments": {{}}}}]{end}',
            (("get_weather", PARIS), ("get_time", "{}")),
        ),
        "text and a call": Sample(f"Ok.\n{begin} [{weather}]{end}", (("get_weather", PARIS),), text="Ok."),
        "an unknown tool": Sample(f'{begin}[{{"name": "rm"}}]{end}', text=f'{begin}[{{"name": "rm"}}]{end}'),
        "the marker in a text": Sample(f"About {begin} and so on.", text=f"About {begin} and so on."),
    }


GRANITE = {
    **_in_lists("<|tool_call|>", ""),
    "reasoning in words": Sample(
        'Here is my thought process: Hm.\n\nHere is my response: <|tool_call|>[{"name": "get_time"}]',
        (("get_time", "{}"),),
        reasoning="Hm.",
    ),
}

SEED_OSS = {
    "one call": Sample(
        "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n</function>\n"
        "</seed:tool_call>",
        (("get_weather", PARIS),),
    ),
    "reasoning and text": Sample(
        "<seed:think>Hm</seed:think>\nOk\n<seed:tool_call><function=get_time></function></seed:tool_call>",
        (("get_time", "{}"),),
        text="Ok",
        reasoning="Hm",
    ),
}

MINIMAX_M2 = {
    "one call": Sample(
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n'
        "</invoke>\n"
        "</minimax:tool_call>",
        (("get_weather", PARIS),),
    ),
    "parallel calls": Sample(
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n'
        "</invoke>\n"
        '<invoke name="get_time">\n</invoke>\n</minimax:tool_call>',
        (("get_weather", PARIS), ("get_time", "{}")),
    ),
}

LFM2 = {
    "one call": Sample(
        '<|tool_call_start|>[get_weather(city="Paris")]<|tool_call_end|>', (("get_weather", PARIS),)
    ),
    "text behind a call": Sample(
        "<|tool_call_start|>[get_time()]<|tool_call_end|>Ok.", (("get_time", "{}"),), text="Ok."
    ),
}

OLMO3 = {
    "one call": Sample(
        "<function_calls>\nget_weather(city='Paris')\n</function_calls>", (("get_weather", PARIS),)
    ),
    "parallel calls": Sample(
        "<function_calls>\nget_weather(city='Paris')\nget_time()\n</function_calls>",
        (("get_weather", PARIS), ("get_time", "{}")),
    ),
    "an unknown tool": Sample(
        "<function_calls>\nrm(a=1)\n</function_calls>", text="<function_calls>\nrm(a=1)\n</function_calls>"
    ),
    "an unknown tool behind a call": Sample(
        "<function_calls>\nget_time()\nrm(a=1)\n</function_calls>",
        (("get_time", "{}"),),
        text="rm(a=1)\n</function_calls>",
    ),
}

SAMPLES = {
    "hermes": HERMES,
    "llama3_json": LLAMA3_JSON,
    "mistral": MISTRAL,
    "mistral_named": MISTRAL,
    "pythonic": PYTHONIC,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v31": DEEPSEEK_V31,
    "glm": GLM,
    "kimi": KIMI,
    "gpt_oss": GPT_OSS,
    "qwen3_coder": QWEN3_CODER,
    "generic": GENERIC,
    "granite": GRANITE,
    "phi4_mini": _in_lists("functools", ""),
    "jamba": _in_lists("<tool_calls>", "</tool_calls>"),
    "nemotron": _in_lists("<TOOLCALL>", "</TOOLCALL>"),
    "seed_oss": SEED_OSS,
    "minimax_m2": MINIMAX_M2,
    "lfm2": LFM2,
    "olmo3": OLMO3,
}
CASES = [(name, title) for name, samples in SAMPLES.items() for title in samples]
