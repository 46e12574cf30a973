"""With truncation, the newest part of a conversation that fits is what the model sees."""

from __future__ import annotations

from typing import Any

import pytest

from graphllm.errors import ContextLengthError
from graphllm.sampling_params import SamplingParams
from graphllm.server.generation.chat import PreparedChat
from graphllm.server.generation.request import GenerationRequest
from graphllm.server.openai.responses.truncation import prepare_truncated

CONTEXT = 100


class Model:
    """A token a character, and `around` tokens around each message."""

    def __init__(self, around: int = 5) -> None:
        self.around = around
        self.tried: list[int] = []
        self.num_counted = 0

    def prepare(self, messages: list[dict[str, Any]]) -> PreparedChat:
        num_tokens = sum(len(message["content"]) + self.around for message in messages)
        self.tried.append(len(messages))
        self.kept = messages
        if num_tokens > CONTEXT:
            raise ContextLengthError("too long", param="messages")
        return PreparedChat(GenerationRequest(prompts=[[1] * num_tokens], params=SamplingParams()), ())

    def count_tokens(self, text: str, most: int) -> int:
        self.num_counted += 1
        return min(len(text), most)

    def truncate(self, messages: list[dict[str, Any]], max_tokens: int = CONTEXT - 1) -> list[dict[str, Any]]:
        prepare_truncated(
            messages, prepare=self.prepare, count_tokens=self.count_tokens, max_tokens=max_tokens
        )
        return self.kept


def said(role: str, num_chars: int, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": "x" * num_chars, **more}


def chat(num_turns: int, num_chars: int = 10) -> list[dict[str, Any]]:
    return [said(role, num_chars) for _ in range(num_turns) for role in ("user", "assistant")][:-1]


def test_chat_that_fits_is_left_alone() -> None:
    model = Model()
    messages = chat(3)
    assert model.truncate(messages) == messages and model.tried == [5]


def test_oldest_messages_go_and_a_user_begins() -> None:
    messages = chat(20)
    kept = Model().truncate(messages)
    assert kept == messages[-len(kept) :]
    assert kept[0]["role"] == "user"
    assert len(kept) == 5  # 5 * 15 fit in 99; the next that a user begins would be 7 * 15


def test_instructions_stay() -> None:
    messages = [said("system", 30), said("developer", 10), *chat(20)]
    kept = Model().truncate(messages)
    assert kept[:2] == messages[:2] and kept[2]["role"] == "user"
    assert kept[2:] == messages[-len(kept) + 2 :]


def test_room_for_the_answer_is_kept() -> None:
    kept = Model().truncate(chat(20), max_tokens=50)
    assert len(kept) == 3


def test_result_does_not_stand_without_its_call() -> None:
    messages = [
        said("user", 60),
        said("assistant", 10, tool_calls=[{}]),
        said("tool", 10),
        said("user", 10),
        said("assistant", 10),
        said("user", 10),
    ]
    assert Model().truncate(messages) == messages[3:]


def test_template_that_takes_more_than_estimated_is_met_in_few_tries() -> None:
    model = Model(around=12)
    messages = chat(50, num_chars=1)
    kept = model.truncate(messages)
    assert 0 < len(kept) <= 7 and kept[0]["role"] == "user"
    assert len(model.tried) <= 5


def test_counting_stops_where_the_room_ends() -> None:
    model = Model()
    model.truncate(chat(5000))
    assert model.num_counted < 20


def test_newest_message_that_does_not_fit_by_itself_is_an_error() -> None:
    with pytest.raises(ContextLengthError):
        Model().truncate([*chat(3), said("assistant", 5), said("user", 200)])


def test_instructions_that_leave_no_room_are_an_error() -> None:
    with pytest.raises(ContextLengthError):
        Model().truncate([said("system", 200), *chat(3)])


@pytest.mark.parametrize("role", ["system", "developer", "assistant", "tool"])
def test_chat_without_a_user_ends_with_its_last_message(role: str) -> None:
    messages = [said(role, 50), said(role, 50), said(role, 20)]
    assert Model().truncate(messages)[-1] == messages[-1]
