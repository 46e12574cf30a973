"""The formats, one table each: how the model families write tool calls and reasoning.

Owns the facts, taken from the families' chat templates and model cards. What the words of a description
mean is `syntax.py`'s.
"""

from __future__ import annotations

from graphllm.output_formats.syntax import (
    Anchor,
    CallSyntax,
    Envelope,
    JsonCall,
    ListUse,
    MessageSyntax,
    NamedJsonCall,
    NameText,
    ParameterCall,
    PythonCall,
    ReasoningSyntax,
)

# <tool_call>
# {"name": "f", "arguments": {...}}
# </tool_call>
# NousResearch's Hermes, Qwen2.5, Qwen3, SmolLM2 (with a list inside).
HERMES = (
    CallSyntax(
        JsonCall(),
        (Envelope("<tool_call>", "</tool_call>"),),
        list_use=ListUse.MAYBE,
        is_repeated=True,
        written_begin="\n",
        written_between="\n",
        written_end="\n",
    ),
)

# {"name": "f", "parameters": {...}}, behind <|python_tag|> or not, several with ";" between them.
# Llama 3.1, 3.2, 3.3.
LLAMA3_JSON = (
    CallSyntax(
        JsonCall(arguments_keys=("parameters", "arguments"), ignores_other_keys=False),
        (Envelope(anchor=Anchor.REPLY), Envelope("<|python_tag|>")),
        separator=";",
        written_between="; ",
    ),
)

# [TOOL_CALLS][{"name": "f", "arguments": {...}, "id": "abcdefghi"}]: Mistral 7B v0.3, Nemo, Small 2409.
MISTRAL_LISTS = CallSyntax(
    JsonCall(), (Envelope("[TOOL_CALLS]"),), list_use=ListUse.MAYBE, writes_list=True, written_between=", "
)
# [TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{...}, later without an id: Mistral Small 3, Magistral, Devstral.
MISTRAL_NAMES = CallSyntax(
    NamedJsonCall(NameText(ends=("[ARGS]",), stops=("{",), id_mark="[CALL_ID]")),
    (Envelope("[TOOL_CALLS]"),),
    is_repeated=True,
)
MISTRAL = (MISTRAL_LISTS, MISTRAL_NAMES)
MISTRAL_NAMED = (MISTRAL_NAMES, MISTRAL_LISTS)

# [f(a=1, b="x"), g()]: Llama 3.2 and 4 (there between <|python_start|> and <|python_end|>, or not), ToolACE.
PYTHONIC = (
    CallSyntax(
        PythonCall(),
        (Envelope(anchor=Anchor.LINE), Envelope("<|python_start|>", "<|python_end|>")),
        list_use=ListUse.ALWAYS,
        writes_list=True,
        written_between=", ",
    ),
)


def _deepseek_marker(words: str) -> str:
    """DeepSeek's special tokens: fullwidth bars around, and SentencePiece's blanks between the words."""
    return f"<\uff5c{words.replace(' ', chr(0x2581))}\uff5c>"


DEEPSEEK_CALLS_BEGIN = _deepseek_marker("tool calls begin")
_DEEPSEEK_SEPARATOR = _deepseek_marker("tool sep")
_DEEPSEEK_CALL_END = _deepseek_marker("tool call end")
_FENCE = "\n```json\n"


def _deepseek(
    *ends: str, writes_lead: bool, closers: tuple[str, ...], written_between: str = ""
) -> tuple[CallSyntax, ...]:
    leads = (f"function{_DEEPSEEK_SEPARATOR}",)
    return (
        CallSyntax(
            NamedJsonCall(NameText(ends=ends, stops=("{",), leads=leads, writes_lead=writes_lead)),
            (Envelope(DEEPSEEK_CALLS_BEGIN, _deepseek_marker("tool calls end")), Envelope()),
            begin=_deepseek_marker("tool call begin"),
            closers=closers,
            other_closers=("```",),
            written_between=written_between,
        ),
    )


# <|tool_calls_begin|><|tool_call_begin|>function<|tool_sep|>f
# ```json
# {...}
# ```<|tool_call_end|><|tool_calls_end|> with DeepSeek's bars and blanks: DeepSeek-V3, R1.
DEEPSEEK_V3 = _deepseek(
    _FENCE,
    _DEEPSEEK_SEPARATOR,
    writes_lead=True,
    closers=("\n```", _DEEPSEEK_CALL_END),
    written_between="\n",
)
# <|tool_calls_begin|><|tool_call_begin|>f<|tool_sep|>{...}<|tool_call_end|><|tool_calls_end|>, likewise:
# DeepSeek-V3.1.
DEEPSEEK_V31 = _deepseek(_DEEPSEEK_SEPARATOR, _FENCE, writes_lead=False, closers=(_DEEPSEEK_CALL_END,))

# <tool_call>f
# <arg_key>k</arg_key>
# <arg_value>v</arg_value>
# </tool_call>: GLM-4.5, 4.6; without the line breaks GLM-4.7.
GLM = (
    CallSyntax(
        ParameterCall(
            NameText(ends=("\n",), stops=("<arg_key>", "</tool_call>")),
            key_begin="<arg_key>",
            key_end="</arg_key>",
            value_begin="<arg_value>",
            value_end="</arg_value>",
            end="</tool_call>",
        ),
        (Envelope("<tool_call>", "</tool_call>"),),
        is_repeated=True,
        written_between="\n",
    ),
)

# <|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{...}<|tool_call_end|> between
# <|tool_calls_section_begin|> and <|tool_calls_section_end|>: Kimi K2.
KIMI = (
    CallSyntax(
        NamedJsonCall(
            NameText(
                ends=("<|tool_call_argument_begin|>",),
                leads=("functions.",),
                writes_lead=True,
                number_mark=":",
                is_call_id=True,
            )
        ),
        (Envelope("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"), Envelope()),
        begin="<|tool_call_begin|>",
        closers=("<|tool_call_end|>",),
    ),
)

# <tool_call>
# <function=f>
# <parameter=k>
# v
# </parameter>
# </function>
# </tool_call>: Qwen3-Coder, which forgets the outer markers at times.
QWEN3_CODER = (
    CallSyntax(
        ParameterCall(
            NameText(ends=(">\n", ">")),
            key_begin="<parameter=",
            key_end=">",
            value_begin="",
            value_end="</parameter>",
            end="</function>",
            trims_line=True,
        ),
        (Envelope("<tool_call>", "</tool_call>"), Envelope()),
        begin="<function=",
        closers=("</function>",),
        is_repeated=True,
        written_begin="\n",
        written_between="\n",
        written_end="\n",
    ),
)

# The same inside <seed:tool_call>, values without line breaks of their own: Seed-OSS.
SEED_OSS = (
    CallSyntax(
        ParameterCall(
            NameText(ends=(">\n", ">")),
            key_begin="<parameter=",
            key_end=">",
            value_begin="",
            value_end="</parameter>",
            end="</function>",
        ),
        (Envelope("<seed:tool_call>", "</seed:tool_call>"), Envelope()),
        begin="<function=",
        closers=("</function>",),
        is_repeated=True,
        written_begin="\n",
        written_between="\n",
        written_end="\n",
    ),
)

# <minimax:tool_call>
# <invoke name="f">
# <parameter name="k">v</parameter>
# </invoke>
# </minimax:tool_call>: MiniMax-M2.
MINIMAX_M2 = (
    CallSyntax(
        ParameterCall(
            NameText(ends=('">\n', '">')),
            key_begin='<parameter name="',
            key_end='">',
            value_begin="",
            value_end="</parameter>",
            end="</invoke>",
        ),
        (Envelope("<minimax:tool_call>", "</minimax:tool_call>"),),
        begin='<invoke name="',
        closers=("</invoke>",),
        written_begin="\n",
        written_between="\n",
        written_end="\n",
    ),
)


def _json_list(*envelopes: Envelope) -> tuple[CallSyntax, ...]:
    return (
        CallSyntax(JsonCall(), envelopes, list_use=ListUse.MAYBE, writes_list=True, written_between=", "),
    )


# <|tool_call|>[{"name": "f", "arguments": {...}}]: Granite 3. Granite 4 writes as Hermes.
GRANITE = _json_list(Envelope("<|tool_call|>"), Envelope("<tool_call>", "</tool_call>"))
# functools[{"name": "f", "arguments": {...}}]: Phi-4-mini.
PHI4_MINI = _json_list(Envelope("functools"))
# <tool_calls>[{"name": "f", "arguments": {...}}]</tool_calls>: Jamba, Hunyuan-A13B.
JAMBA = _json_list(Envelope("<tool_calls>", "</tool_calls>"))
# <TOOLCALL>[{"name": "f", "arguments": {...}}]</TOOLCALL>: Nemotron Nano v2, Super v1.5.
NEMOTRON = _json_list(Envelope("<TOOLCALL>", "</TOOLCALL>"))

# <|tool_call_start|>[f(a=1)]<|tool_call_end|>: LFM2.
LFM2 = (
    CallSyntax(
        PythonCall(),
        (Envelope("<|tool_call_start|>", "<|tool_call_end|>"),),
        list_use=ListUse.ALWAYS,
        writes_list=True,
        written_between=", ",
    ),
)

# <function_calls>
# f(a=1)
# g()
# </function_calls>: Olmo 3.
OLMO3 = (
    CallSyntax(
        PythonCall(),
        (Envelope("<function_calls>", "</function_calls>"),),
        written_begin="\n",
        written_between="\n",
        written_end="\n",
    ),
)

# JSON calls anywhere, in a fence, in tags, in a list or not: what models write that were told so in words.
GENERIC = (
    CallSyntax(
        JsonCall(name_keys=("name", "function"), ignores_other_keys=False),
        (
            Envelope(),
            Envelope("```json", "```"),
            Envelope("```", "```"),
            Envelope("<tool_call>", "</tool_call>"),
        ),
        list_use=ListUse.MAYBE,
        written_between="\n",
    ),
)

# <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.f
# <|constrain|>json<|message|>{...}<|call|>, and the answer in the channel "final": gpt-oss.
# https://cookbook.openai.com/articles/openai-harmony
HARMONY = MessageSyntax(
    header_begins=("<|start|>", "<|channel|>"),
    header_end="<|message|>",
    channel_mark="<|channel|>",
    recipient_mark="to=",
    recipient_lead="functions.",
    body_ends=("<|end|>", "<|call|>", "<|return|>"),
    reasoning_channels=("analysis",),
    written_call="<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>",
    written_reasoning=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
)

# DeepSeek-R1, Qwen3, GLM-4.5, SmolLM3 and most others.
THINK = ReasoningSyntax(("<think>",), ("</think>",))
# Kimi K2 Thinking calls tools out of its reasoning.
KIMI_THINK = ReasoningSyntax(("<think>",), ("</think>",), stops=("<|tool_calls_section_begin|>",))
# Magistral: special tokens in later versions, <think> before.
MISTRAL_THINK = ReasoningSyntax(("[THINK]", "<think>"), ("[/THINK]", "</think>"))
# Granite 3.2, which writes it in words.
GRANITE_THINK = ReasoningSyntax(
    ("Here is my thought process:", "Here's my thought process:"),
    ("Here is my response:", "Here's my response:"),
)
# Seed-OSS.
SEED_THINK = ReasoningSyntax(("<seed:think>",), ("</seed:think>",))
