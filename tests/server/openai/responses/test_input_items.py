"""Input items are checked under their own paths and stored in one form."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.responses.response_item import ResponseItem
from pydantic import TypeAdapter

from graphllm.errors import InvalidRequestError, UnsupportedFieldError
from graphllm.server.generation.decoding import NestedReader
from graphllm.server.openai.responses.input_items import checked_items

CALL = {"type": "function_call", "call_id": "call_1", "name": "look_up", "arguments": '{"word":"a"}'}
RESULT = {"type": "function_call_output", "call_id": "call_1", "output": "found"}


def checked(*items: Any, known: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    return checked_items(list(items), known_call_ids=known, reader=NestedReader())


def test_text_is_a_message_of_the_user() -> None:
    (item,) = checked_items("Hello", known_call_ids=(), reader=NestedReader())
    assert item["id"].startswith("msg_")
    assert (item["type"], item["role"], item["status"]) == ("message", "user", "completed")
    assert item["content"] == [{"type": "input_text", "text": "Hello"}]


def test_items_get_ids_and_keep_those_they_have() -> None:
    items = checked({"role": "user", "content": "a"}, {**CALL, "id": "fc_mine"}, RESULT)
    assert [item["id"].split("_")[0] for item in items] == ["msg", "fc", "fco"]
    assert items[1]["id"] == "fc_mine"
    assert len({item["id"] for item in items}) == 3


@pytest.mark.parametrize(
    "item",
    [
        {"role": "user", "content": "a"},
        {"role": "developer", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        CALL,
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
    ],
)
def test_stored_form_is_one_that_the_client_library_reads(item: dict[str, Any]) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseItem)
    (stored,) = checked(item)
    assert adapter.validate_python(stored).type == stored["type"]


def test_answer_can_be_sent_back_as_it_came() -> None:
    answer = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Yes", "annotations": [], "logprobs": []}],
    }
    (stored,) = checked(answer)
    assert stored["content"] == [{"type": "output_text", "text": "Yes", "annotations": []}]


def test_call_cut_short_may_have_broken_arguments() -> None:
    (stored,) = checked({**CALL, "arguments": '{"wo', "status": "incomplete"})
    assert stored["arguments"] == '{"wo'


def test_output_may_be_a_list_of_texts_and_answer_a_call_of_an_earlier_turn() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    (stored,) = checked({**RESULT, "output": parts}, known=("call_1",))
    assert stored["output"] == parts


REFUSED: dict[str, tuple[Any, str]] = {
    "no type": ({}, "input[0].type"),
    "type of a wrong type": ({"type": 3}, "input[0].type"),
    "an unknown type": ({"type": "web_search_call", "id": "x"}, "input[0].type"),
    "a reference": ({"type": "item_reference", "id": "msg_1"}, "input[0].type"),
    "an unknown role": ({"role": "critic", "content": "a"}, "input[0].role"),
    "no content": ({"role": "user"}, "input[0].content"),
    "null content": ({"role": "user", "content": None}, "input[0].content"),
    "no parts": ({"role": "user", "content": []}, "input[0].content"),
    "an unknown key": ({"role": "user", "content": "a", "contents": "b"}, "input[0].contents"),
    "a phase": ({"role": "assistant", "content": "a", "phase": "commentary"}, "input[0].phase"),
    "a status": ({"role": "user", "content": "a", "status": "done"}, "input[0].status"),
    "an image": (
        {"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]},
        "input[0].content[0].type",
    ),
    "a part that is no object": ({"role": "user", "content": ["a"]}, "input[0].content[0]"),
    "a part without a type": ({"role": "user", "content": [{"text": "a"}]}, "input[0].content[0].type"),
    "a part without text": (
        {"role": "user", "content": [{"type": "input_text"}]},
        "input[0].content[0].text",
    ),
    "text that is none": (
        {"role": "user", "content": [{"type": "input_text", "text": 1}]},
        "input[0].content[0].text",
    ),
    "arguments that are no object": ({**CALL, "arguments": "[]"}, "input[0].arguments"),
    "arguments nested too deeply": ({**CALL, "arguments": '{"a":' * 3000}, "input[0].arguments"),
    "a namespace": ({**CALL, "namespace": "mine"}, "input[0].namespace"),
    "a program's call": ({**CALL, "caller": {"type": "program"}}, "input[0].caller"),
    "an output without its call": (RESULT, "input[0].call_id"),
    "an output that is none": ({**RESULT, "output": 3}, "input[0].output"),
    "foreign reasoning": (
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA"},
        "input[0].encrypted_content",
    ),
    "reasoning of a wrong type": ({"type": "reasoning", "summary": "hm"}, "input[0].summary"),
}


@pytest.mark.parametrize(("item", "param"), REFUSED.values(), ids=REFUSED)
def test_wrong_item_is_refused_by_its_path(item: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        checked(item)
    assert caught.value.param == param
    assert param in caught.value.message


def test_path_counts_the_items_before_it() -> None:
    with pytest.raises(UnsupportedFieldError) as caught:
        checked({"role": "user", "content": "a"}, CALL, {"type": "computer_call"})
    assert caught.value.param == "input[2].type"
