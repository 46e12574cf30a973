"""LangChain's OpenAI integration, unmodified, does with this server what it does with OpenAI's."""

from __future__ import annotations

import asyncio
import math
from typing import Any, Literal

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

from tests.e2e.serving import ServerProcess

COUNT = "Count from 1 to 10."
COUNTED = "1. 1\n2. 2\n3. 3\n4. 4\n5. 5\n6. 6\n7."


class Weather(BaseModel):
    """The weather in a city."""

    city: str = Field(description="name of the city", max_length=20)
    unit: Literal["celsius", "fahrenheit"]


def chat_model(server: ServerProcess, **fields: Any) -> ChatOpenAI:
    fields = {"temperature": 0, "max_tokens": 32, "max_retries": 0, **fields}
    return ChatOpenAI(model="demo", base_url=f"{server.url}/v1", api_key="none", **fields)


def test_a_chat_is_answered_whole_and_streamed(server: ServerProcess) -> None:
    model = chat_model(server, stream_usage=True)
    answer = model.invoke([SystemMessage("You are a helpful AI assistant."), HumanMessage(COUNT)])
    assert isinstance(answer, AIMessage) and answer.text.startswith("1")
    assert answer.usage_metadata is not None and answer.usage_metadata["output_tokens"] == 32
    assert model.invoke(COUNT).text == COUNTED
    chunks = list(model.stream(COUNT))
    assert "".join(chunk.text for chunk in chunks) == COUNTED and len(chunks) > 16
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == 32


def test_a_batch_and_async_calls_say_what_single_ones_say(server: ServerProcess) -> None:
    model = chat_model(server, max_tokens=12)
    alone = model.invoke(COUNT).text
    assert [answer.text for answer in model.batch([COUNT, COUNT, COUNT])] == [alone] * 3
    assert asyncio.run(model.ainvoke(COUNT)).text == alone


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_an_object_of_the_class(
    server: ServerProcess, method: Literal["json_schema", "function_calling"]
) -> None:
    model = chat_model(server, max_tokens=64, temperature=1, seed=3)
    answer = model.with_structured_output(Weather, method=method).invoke("How warm is it in Paris?")
    assert isinstance(answer, Weather)


def test_a_tool_is_called_and_its_result_is_read(server: ServerProcess) -> None:
    model = chat_model(server, max_tokens=160)
    caller = model.bind_tools([Weather], tool_choice="any", parallel_tool_calls=False)
    question = HumanMessage("How warm is it in Paris?")
    answer = caller.invoke([question])
    (call,) = answer.tool_calls
    assert call["name"] == "Weather"
    Weather.model_validate(call["args"])
    streamed = None
    for chunk in caller.stream([question]):
        streamed = chunk if streamed is None else streamed + chunk
    assert streamed is not None
    assert [(each["name"], each["args"]) for each in streamed.tool_calls] == [(call["name"], call["args"])]
    result = ToolMessage('{"temperature": 21}', tool_call_id=call["id"])
    assert model.bind_tools([Weather]).invoke([question, answer, result]).text is not None


def test_completions_and_embeddings_work(server: ServerProcess) -> None:
    completion = OpenAI(
        model="demo", base_url=f"{server.url}/v1", api_key="none", temperature=0, max_tokens=8
    )
    assert completion.invoke("1, 2, 3, 4,").startswith(" 5")
    embedder = OpenAIEmbeddings(
        model="demo", base_url=f"{server.url}/v1", api_key="none", check_embedding_ctx_length=False
    )
    vectors = embedder.embed_documents(["a cat", "a dog", "a cat"])
    assert [len(vector) for vector in vectors] == [576] * 3
    assert vectors[0] == pytest.approx(vectors[2]) and vectors[0] != pytest.approx(vectors[1])
    assert math.hypot(*embedder.embed_query("a cat")) == pytest.approx(1.0, abs=1e-4)
