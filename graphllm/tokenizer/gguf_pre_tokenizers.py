"""What a GGUF file's `tokenizer.ggml.pre` means: how text is cut into words before byte-level BPE.

Owns the table of names. The patterns are those of the models' own tokenizer.json files. Names that are not
here are refused by `gguf_vocabulary.py`: a wrong cut gives plausible text of lower quality.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

Steps = Callable[[], list[pre_tokenizers.PreTokenizer]]

_ENDS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# GPT-4's; Qwen 2's differs in how many digits make a group.
_CL100K = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _ENDS
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _ENDS
# Words by case: GPT-4o's, and Mistral's Tekken without contractions and with single digits.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_FIRST = r"[^\r\n\p{L}\p{N}]?"
_SLASHED_ENDS = _ENDS.replace(r"[\r\n]*|", r"[\r\n/]*|", 1)
_O200K = (
    rf"{_FIRST}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_FIRST}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}" + _SLASHED_ENDS
)
_TEKKEN = rf"{_FIRST}{_UPPER}*{_LOWER}+|{_FIRST}{_UPPER}+{_LOWER}*|\p{{N}}" + _SLASHED_ENDS
# Letters with case, but for the Georgian ones that had none when the pattern was made.
_CASED = "[[\\p{Lu}\\p{Ll}\\p{Lt}]&&[^\u10d0-\u10ff]]"
# Hangul and Han as the models' authors wrote their range down; Japanese syllables.
_EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_JAPANESE_AND_HAN = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?{_CASED}+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _EAST_ASIAN,
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    _JAPANESE_AND_HAN,
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def _gpt2() -> list[pre_tokenizers.PreTokenizer]:
    """GPT-2's own pattern, which the byte-level step has."""
    return [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]


def _single_digits() -> list[pre_tokenizers.PreTokenizer]:
    """Every Unicode digit by itself; the byte-level step alone would keep digits outside ASCII together."""
    return [pre_tokenizers.Digits(individual_digits=True), *_gpt2()]


def _falcon() -> list[pre_tokenizers.PreTokenizer]:
    return [
        pre_tokenizers.Punctuation("contiguous"),
        *_gpt2(),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
    ]


def _splits(*patterns: str, single_digits: bool = False) -> Steps:
    """What each pattern matches stands alone, one pattern after the other."""

    def steps() -> list[pre_tokenizers.PreTokenizer]:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if single_digits else []
        return [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns),
            *digits,
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]

    return steps


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """What comes before byte-level BPE.

    steps: makes the steps anew. nfc: text is composed first. ignore_merges: a word that is itself a token
    is not built from merges. adds_bos: what holds when `tokenizer.ggml.add_bos_token` is absent.
    """

    steps: Steps
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


_GPT2 = PreTokenizer(steps=_gpt2)
_GPT2_COMPOSED = PreTokenizer(steps=_gpt2, nfc=True)
_SINGLE_DIGITS = PreTokenizer(steps=_single_digits)
_LLAMA3 = PreTokenizer(steps=_splits(_CL100K), ignore_merges=True, adds_bos=True)
_QWEN = PreTokenizer(steps=_splits(_QWEN2), nfc=True)
_GLM4 = PreTokenizer(steps=_splits(_CL100K))
_TEKKEN_RULES = PreTokenizer(steps=_splits(_TEKKEN), ignore_merges=True, adds_bos=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "chatglm-bpe": _GLM4,
    "codeshell": _SINGLE_DIGITS,
    "command-r": PreTokenizer(steps=_single_digits, nfc=True),
    "dbrx": PreTokenizer(steps=_splits(_CL100K)),
    "deepseek-coder": PreTokenizer(steps=_splits(*_DEEPSEEK_CODER, single_digits=True)),
    "deepseek-llm": PreTokenizer(steps=_splits(*_DEEPSEEK_LLM, single_digits=True)),
    "deepseek-r1-qwen": _QWEN,
    "deepseek-v3": PreTokenizer(steps=_splits(*_DEEPSEEK_V3)),
    "default": _GPT2,
    "falcon": PreTokenizer(steps=_falcon),
    "glm4": _GLM4,
    "gpt-2": _GPT2,
    "gpt-4o": PreTokenizer(steps=_splits(_O200K)),
    "gpt2": _GPT2,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "mpt": _GPT2_COMPOSED,
    "olmo": _GPT2_COMPOSED,
    "phi-2": _GPT2,
    "pixtral": _TEKKEN_RULES,
    "qwen2": _QWEN,
    "refact": _SINGLE_DIGITS,
    # Llama 3's tokenizer in models that begin texts with nothing (SmolLM3 is one).
    "smaug-bpe": PreTokenizer(steps=_splits(_CL100K), ignore_merges=True),
    "smollm": _SINGLE_DIGITS,
    "stablelm2": _QWEN,
    "starcoder": _SINGLE_DIGITS,
    "tekken": _TEKKEN_RULES,
}
"""By the value of `tokenizer.ggml.pre`."""
