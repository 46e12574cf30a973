"""Streams and bodies are, byte for byte, what they were: a change of shape is seen before clients see it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.server.openai.golden import CASES, FOLDER, answer, path_of


@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_byte_for_byte_what_it_was(name: str) -> None:
    assert answer(name) == path_of(name).read_bytes()


def test_every_golden_answer_has_a_case() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(CASES)


@pytest.mark.parametrize("name", [name for name in CASES if name != "chat_stream_failure"])
def test_a_golden_answer_is_what_the_official_models_expect(name: str) -> None:
    kind: Any = Completion
    if name.startswith("chat"):
        kind = ChatCompletionChunk if "stream" in name else ChatCompletion
    body = path_of(name).read_text(encoding="utf-8").replace('"created":TIME', '"created":1')
    if "stream" in name:
        *events, done, rest = body.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        bodies = [event.removeprefix("data: ") for event in events]
    else:
        bodies = [body]
    for text in bodies:
        fields = json.loads(text)
        if kind is Completion:
            # The older models have no place for chunks without an end, nor for tokens without alternatives.
            for choice in fields["choices"]:
                choice["finish_reason"] = choice["finish_reason"] or "stop"
                if choice["logprobs"]:
                    choice["logprobs"]["token_logprobs"] = choice["logprobs"]["token_logprobs"][1:]
                    choice["logprobs"]["top_logprobs"] = choice["logprobs"]["top_logprobs"][1:]
        kind.model_validate(fields, strict=True)
