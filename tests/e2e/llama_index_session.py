"""What a user of LlamaIndex does with a server: run as `llama_index_session.py URL`, prints results as JSON.

A script of its own because LlamaIndex lives in an environment of its own (`llama_index_requirements.txt`).
"""

import asyncio
import json
import sys

from llama_index.core.llms import ChatMessage, MessageRole
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class City(BaseModel):
    """A city."""

    name: str
    is_capital: bool


def add(a: int, b: int) -> int:
    """Add two integers."""
    return a + b


def main(url: str) -> None:
    common = {"model": "demo", "api_base": f"{url}/v1", "api_key": "none", "max_retries": 0}
    llm = OpenAILike(
        **common,
        is_chat_model=True,
        is_function_calling_model=True,
        should_use_structured_outputs=True,
        context_window=8192,
        temperature=0,
        max_tokens=32,
    )
    messages = [ChatMessage(role=MessageRole.USER, content="Count from 1 to 10.")]
    results = {
        "chat": llm.chat(messages).message.content,
        "stream": [chunk.delta for chunk in llm.stream_chat(messages)],
        "async": asyncio.run(llm.achat(messages)).message.content,
    }
    tool = FunctionTool.from_defaults(fn=add)
    question = "What is 2 and 3 together?"
    answer = llm.chat_with_tools([tool], user_msg=question, tool_required=True)
    results["calls"] = [
        {"name": call.tool_name, "arguments": call.tool_kwargs}
        for call in llm.get_tool_calls_from_response(answer)
    ]
    city = llm.structured_predict(City, PromptTemplate("Name a city."))
    results["structured"] = city.model_dump()
    plain = OpenAILike(**common, is_chat_model=False, context_window=8192, temperature=0, max_tokens=8)
    results["completion"] = plain.complete("1, 2, 3, 4,").text
    embedding = OpenAIEmbedding(model_name="demo", api_base=f"{url}/v1", api_key="none", max_retries=0)
    results["embedding"] = embedding.get_text_embedding("a cat")
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
