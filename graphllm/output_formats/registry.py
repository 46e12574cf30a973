"""Which formats there are, by name, and which one a model writes.

Owns the names and the guess. What a format looks like is `formats.py`'s.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

from graphllm.output_formats import formats
from graphllm.output_formats.output_format import OutputFormat
from graphllm.output_formats.syntax import ReasoningSyntax

_FORMATS = {
    found.name: found
    for found in (
        OutputFormat("hermes", formats.HERMES, formats.THINK),
        OutputFormat("llama3_json", formats.LLAMA3_JSON),
        OutputFormat("mistral", formats.MISTRAL, formats.MISTRAL_THINK),
        OutputFormat("mistral_named", formats.MISTRAL_NAMED, formats.MISTRAL_THINK),
        OutputFormat("pythonic", formats.PYTHONIC),
        OutputFormat("deepseek_v3", formats.DEEPSEEK_V3, formats.THINK),
        OutputFormat("deepseek_v31", formats.DEEPSEEK_V31, formats.THINK),
        OutputFormat("glm", formats.GLM, formats.THINK),
        OutputFormat("kimi", formats.KIMI, formats.KIMI_THINK),
        OutputFormat("gpt_oss", (), None, formats.HARMONY),
        OutputFormat("qwen3_coder", formats.QWEN3_CODER, formats.THINK),
        OutputFormat("seed_oss", formats.SEED_OSS, formats.SEED_THINK),
        OutputFormat("minimax_m2", formats.MINIMAX_M2, formats.THINK),
        OutputFormat("granite", formats.GRANITE, formats.GRANITE_THINK),
        OutputFormat("phi4_mini", formats.PHI4_MINI),
        OutputFormat("jamba", formats.JAMBA, formats.THINK),
        OutputFormat("nemotron", formats.NEMOTRON, formats.THINK),
        OutputFormat("lfm2", formats.LFM2, formats.THINK),
        OutputFormat("olmo3", formats.OLMO3, formats.THINK),
        OutputFormat("generic", formats.GENERIC, formats.THINK),
    )
}

# Names that other servers have given the same formats.
_OTHER_NAMES = {
    **{"qwen": "hermes", "qwen25": "hermes", "llama3": "llama3_json", "llama4_json": "llama3_json"},
    **{"llama4_pythonic": "pythonic", "deepseek": "deepseek_v31", "glm45": "glm", "glm47": "glm"},
    **{"kimi_k2": "kimi", "openai": "gpt_oss", "gpt-oss": "gpt_oss", "qwen3_xml": "qwen3_coder"},
    **{"phi4_mini_json": "phi4_mini", "hunyuan_a13b": "jamba", "nemotron_json": "nemotron"},
}

_REASONING = {
    "think": formats.THINK,
    "kimi": formats.KIMI_THINK,
    "mistral": formats.MISTRAL_THINK,
    "granite": formats.GRANITE_THINK,
    "seed_oss": formats.SEED_THINK,
    "none": None,
}
_OTHER_REASONING_NAMES = {
    **{"deepseek_r1": "think", "deepseek_v3": "think", "qwen3": "think", "glm45": "think", "glm": "think"},
    **{
        "hunyuan_a13b": "think",
        "olmo3": "think",
        "step3": "think",
        "ernie45": "think",
        "minimax_m2": "think",
    },
    **{"kimi_k2": "kimi"},
}

# Texts of chat templates that tell the format by themselves, in the order in which they are looked for.
_DECISIVE_TEXTS = {
    "<seed:tool_call>": "seed_oss",
    "<minimax:tool_call>": "minimax_m2",
    "<function=": "qwen3_coder",
    "<arg_key>": "glm",
    "<|tool_call_start|>": "lfm2",
    "<function_calls>": "olmo3",
    "<TOOLCALL>": "nemotron",
    "<tool_calls>": "jamba",
    "functools[": "phi4_mini",
    "<|tool_call|>": "granite",
}

FORMAT_NAMES = tuple(sorted([*_FORMATS, *_OTHER_NAMES]))
"""Names that `find_format` knows."""

REASONING_NAMES = tuple(sorted([*_REASONING, *_OTHER_REASONING_NAMES]))
"""Names that `with_reasoning` knows."""


def find_format(name: str) -> OutputFormat:
    """The format of that name, one of FORMAT_NAMES. Raises KeyError."""
    return _FORMATS[_OTHER_NAMES.get(name, name)]


def with_reasoning(output_format: OutputFormat, name: str) -> OutputFormat:
    """A format with the reasoning sections of another, one of REASONING_NAMES. Raises KeyError.

    Formats whose replies consist of messages keep theirs: the messages say what is reasoning.
    """
    reasoning = _REASONING[_OTHER_REASONING_NAMES.get(name, name)]
    return (
        output_format if output_format.messages is not None else replace(output_format, reasoning=reasoning)
    )


def guess_format(chat_template: str, vocabulary: Container[str]) -> OutputFormat:
    """The format that a model writes, from the markers in its chat template and its vocabulary.

    vocabulary: the texts of its tokens. Where nothing is recognised, the generic format.
    """
    found = find_format(_guessed_name(chat_template, vocabulary))
    if found.messages is not None:
        return found
    return replace(found, reasoning=_guessed_reasoning(chat_template, vocabulary, found))


def _guessed_name(chat_template: str, vocabulary: Container[str]) -> str:
    """What a template writes for calls of earlier turns is what the model writes; the order matters."""

    def is_known(text: str) -> bool:
        return text in chat_template or text in vocabulary

    if "<|channel|>" in chat_template or ("<|channel|>" in vocabulary and "<|call|>" in vocabulary):
        return "gpt_oss"
    if is_known("<|tool_calls_section_begin|>"):
        return "kimi"
    if is_known(formats.DEEPSEEK_CALLS_BEGIN):
        return "deepseek_v3" if "```json" in chat_template else "deepseek_v31"
    for text, name in _DECISIVE_TEXTS.items():
        if text in chat_template:
            return name
    if is_known("[TOOL_CALLS]"):
        is_named = "[ARGS]" in (chat_template if "[TOOL_CALLS]" in chat_template else vocabulary)
        return "mistral_named" if is_named else "mistral"
    if "<tool_call>" in chat_template:
        return "hermes"
    if is_known("<|python_start|>"):
        return "pythonic"
    if is_known("<|python_tag|>"):
        return "llama3_json"
    return "generic"


def _guessed_reasoning(
    chat_template: str, vocabulary: Container[str], found: OutputFormat
) -> ReasoningSyntax | None:
    candidates = [found.reasoning, *_REASONING.values()]
    for candidate in candidates:
        if candidate is not None and any(
            text in chat_template or text in vocabulary for text in (*candidate.begins, *candidate.ends)
        ):
            return candidate
    return None
