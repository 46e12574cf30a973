"""More tools than are taken are refused before each of them is looked at, in every dialect."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from graphllm.errors import InvalidRequestError
from graphllm.server.anthropic.protocol import MessagesRequest
from graphllm.server.generation.decoding import NestedReader
from graphllm.server.generation.tools import MAX_TOOLS
from graphllm.server.openai.responses.protocol import ResponsesRequest

MESSAGES = {"model": "m", "max_tokens": 1, "messages": []}
RESPONSE = {"model": "m", "input": "x"}


def messages_tools(tools: list[dict[str, Any]]) -> int:
    request = msgspec.convert({**MESSAGES, "tools": tools}, MessagesRequest)
    return len(request.function_tools(NestedReader()))


def response_tools(tools: list[dict[str, Any]]) -> int:
    request = msgspec.convert({**RESPONSE, "tools": tools}, ResponsesRequest)
    return len(request.function_tools(NestedReader()))


@pytest.mark.parametrize("read_tools", [messages_tools, response_tools])
def test_so_many_tools_are_taken_and_no_more(read_tools: Any) -> None:
    make = _anthropic_tool if read_tools is messages_tools else _openai_tool
    tools = [make(f"tool_{number}") for number in range(MAX_TOOLS)]
    assert read_tools(tools) == MAX_TOOLS
    with pytest.raises(InvalidRequestError, match=f"at most {MAX_TOOLS}") as caught:
        read_tools([*tools, {"nothing": "that was looked at"}])
    assert caught.value.param == "tools"


@pytest.mark.parametrize("read_tools", [messages_tools, response_tools])
def test_the_second_tool_of_a_name_is_named(read_tools: Any) -> None:
    make = _anthropic_tool if read_tools is messages_tools else _openai_tool
    with pytest.raises(InvalidRequestError, match="two tools named 'a'") as caught:
        read_tools([make("a"), make("b"), make("a")])
    assert caught.value.param == "tools[2].name"


def _anthropic_tool(name: str) -> dict[str, Any]:
    return {"name": name, "input_schema": {"type": "object"}}


def _openai_tool(name: str) -> dict[str, Any]:
    return {"type": "function", "name": name, "parameters": {"type": "object"}}
