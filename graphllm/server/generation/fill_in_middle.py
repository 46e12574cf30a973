"""Prompts for models that fill a gap: what stands before it and what stands after, between special tokens.

Owns the tokens by which the families mark prefix, suffix and gap, taken from their model cards. A model has
been trained to do this if its vocabulary has the tokens.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from graphllm.errors import InvalidRequestError, UnsupportedFieldError


@dataclass(frozen=True, slots=True)
class GapTokens:
    """Texts of the special tokens. suffix_first: what follows the gap comes before what precedes it."""

    prefix: str
    suffix: str
    middle: str = ""
    suffix_first: bool = False

    def prompt(self, before: str, after: str) -> str:
        """The text whose continuation fills the gap."""
        if self.suffix_first:
            return f"{self.suffix}{after}{self.prefix}{before}{self.middle}"
        return f"{self.prefix}{before}{self.suffix}{after}{self.middle}"


GAP_TOKENS = (
    # Qwen2.5-Coder, CodeGemma
    GapTokens("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    # StarCoder, StarCoder2, Granite Code
    GapTokens("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    # SantaCoder
    GapTokens("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    # DeepSeek-Coder, DeepSeek-V3
    GapTokens("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
    # CodeGeeX4, GLM-4
    GapTokens("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
    # Seed-Coder
    GapTokens("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", suffix_first=True),
    # Codestral, Devstral
    GapTokens("[PREFIX]", "[SUFFIX]", suffix_first=True),
)


def gap_prompts(
    prompt: str | list[str | int | list[int]], suffix: str, added_tokens: Container[str]
) -> str | list[str | int | list[int]]:
    """Each prompt with the suffix, as the model was trained to see them.

    added_tokens: the texts of the vocabulary's special tokens. Raises UnsupportedFieldError for a model
    without the tokens, InvalidRequestError for prompts that are no texts; `param` is "suffix".
    """
    for tokens in GAP_TOKENS:
        if all(text in added_tokens for text in (tokens.prefix, tokens.suffix, tokens.middle) if text):
            break
    else:
        raise UnsupportedFieldError(
            "'suffix' needs a model with fill-in-the-middle tokens; this one has none.", param="suffix"
        )
    if isinstance(prompt, str):
        return tokens.prompt(prompt, suffix)
    filled: list[str | int | list[int]] = []
    for entry in prompt:
        if not isinstance(entry, str):
            raise InvalidRequestError("'suffix' needs prompts that are texts.", param="suffix")
        filled.append(tokens.prompt(entry, suffix))
    return filled
