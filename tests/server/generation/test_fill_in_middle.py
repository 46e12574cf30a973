"""A gap between two texts becomes the prompt that a model was trained to fill it from."""

from __future__ import annotations

from typing import Any

import pytest

from graphllm.server.generation.fill_in_middle import GAP_TOKENS, GapTokens
from tests.server.posting import Posted, byte_tokenizer


@pytest.mark.parametrize("tokens", GAP_TOKENS, ids=lambda tokens: tokens.prefix)
def test_every_family_of_gap_tokens_is_used_in_its_order(tokens: GapTokens) -> None:
    special = tuple(text for text in (tokens.prefix, tokens.suffix, tokens.middle) if text)
    posted = Posted("completions", tokenizer=byte_tokenizer(special=special), prompt="a(", suffix=")b")
    middle = tokens.middle
    if tokens.suffix_first:
        assert posted.prompt == f"{tokens.suffix})b{tokens.prefix}a({middle}"
    else:
        assert posted.prompt == f"{tokens.prefix}a({tokens.suffix})b{middle}"
    # As special tokens, not as text that looks like them.
    ids = set(posted.submitted.prompt_token_ids)
    assert ids >= {byte_tokenizer(special=special).added_tokens[text] for text in special}


def test_every_prompt_of_a_batch_is_filled() -> None:
    tokenizer = byte_tokenizer(special=("[PREFIX]", "[SUFFIX]"))
    posted = Posted("completions", tokenizer=tokenizer, prompt=["a", "b"], suffix="c")
    texts = [
        tokenizer.decode(one.prompt_token_ids, skip_special_tokens=False) for one in posted.engine.submitted
    ]
    assert texts == ["[SUFFIX]c[PREFIX]a", "[SUFFIX]c[PREFIX]b"]


@pytest.mark.parametrize(
    ("special", "fields"),
    [
        ((), {}),
        (("<fim_prefix>",), {}),
        (("[PREFIX]", "[SUFFIX]"), {"prompt": [1, 2]}),
        (("[PREFIX]", "[SUFFIX]"), {"prompt": [[1, 2]]}),
        (("[PREFIX]", "[SUFFIX]"), {"echo": True}),
    ],
)
def test_a_gap_that_cannot_be_filled_is_refused(special: tuple[str, ...], fields: dict[str, Any]) -> None:
    posted = Posted("completions", tokenizer=byte_tokenizer(special=special), suffix="c", **fields)
    assert posted.error["param"] == "suffix"
