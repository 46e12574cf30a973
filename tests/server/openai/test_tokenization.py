"""Texts and chats become the ids that the model is given, and ids the text that they stand for."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.posting import RICH_TEMPLATE, USER, Posted, byte_tokenizer

TOKENIZER = byte_tokenizer(RICH_TEMPLATE, adds_start=True)
START = TOKENIZER.added_tokens["<|im_start|>"]
TOOL = {"type": "function", "function": {"name": "f"}}


def tokenize(**fields: Any) -> Any:
    return Posted("tokenize", tokenizer=TOKENIZER, **fields).json


def test_a_text_is_tokenized_as_a_prompt_would_be() -> None:
    answer = tokenize(prompt="Hi")
    submitted = Posted("completions", tokenizer=TOKENIZER, prompt="Hi").submitted
    assert answer == {"tokens": submitted.prompt_token_ids, "count": 3, "max_model_len": 2000}
    assert answer["tokens"][0] == START
    assert tokenize(prompt="Hi", add_special_tokens=False)["count"] == 2


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": [TOOL]},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"add_special_tokens": True},
    ],
)
def test_a_chat_is_tokenized_as_a_chat_completion_would_be(fields: dict[str, Any]) -> None:
    submitted = Posted("chat", tokenizer=TOKENIZER, **fields).submitted
    assert tokenize(messages=USER, **fields)["tokens"] == submitted.prompt_token_ids


def test_names_that_the_template_does_not_read_are_warned_of() -> None:
    answer = tokenize(messages=USER, chat_template_kwargs={"colour": "red"})
    assert [warning["field"] for warning in answer["warnings"]] == ["chat_template_kwargs.colour"]


def test_texts_of_tokens_come_where_they_are_asked_for() -> None:
    assert tokenize(prompt="Hi", return_token_strs=True)["token_strs"] == ["<|im_start|>", "H", "i"]


def test_ids_become_text_with_special_tokens_or_without() -> None:
    def text(**fields: Any) -> str:
        answer: dict[str, str] = Posted("detokenize", tokenizer=TOKENIZER, **fields).json
        return answer["prompt"]

    token_ids = TOKENIZER.encode("Hé")
    assert text(tokens=token_ids) == "<|im_start|>Hé"
    assert text(tokens=token_ids, skip_special_tokens=True) == "Hé"
    assert text(tokens=[]) == ""


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": "a", "messages": USER}, "prompt"),
        ("tokenize", {"prompt": "a", "tools": [TOOL]}, "tools"),
        ("tokenize", {"prompt": "a" * 3000}, "prompt"),
        ("detokenize", {"tokens": [10_000]}, "tokens"),
        ("detokenize", {"tokens": [1] * 3000}, "tokens"),
    ],
)
def test_what_is_wrong_is_named(path: str, fields: dict[str, Any], param: str) -> None:
    assert Posted(path, tokenizer=TOKENIZER, **fields).error["param"] == param
