"""The exact bytes of answers, kept beside this file; `python -m tests.server.openai.golden` writes them anew.

Ids, times and the server's version are replaced by fixed words. A change of any other byte is a change that
clients see: look at the difference before it is kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graphllm.errors import StepFailedError
from graphllm.outputs import FinishReason
from tests.server.posting import RICH_TEMPLATE, Posted, byte_tokenizer

FOLDER = Path(__file__).parent
RICH = byte_tokenizer(RICH_TEMPLATE)
TOOL = {"type": "function", "function": {"name": "add"}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": "é"}}\n</tool_call>'
CALLS = f'Adding.\n{CALL}\n<tool_call>\n{{"name": "add", "arguments": {{}}}}\n</tool_call>'
REASONED = "<think>\nHm.\n</think>\n\nYes."
USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
CONTINUOUS: dict[str, Any] = {
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}

_REPLACED = (
    (rb"(chatcmpl|cmpl|call)[-_][0-9a-f]{8,}", rb"\1-ID"),
    (rb'"created":\d+', b'"created":TIME'),
    (rb'"system_fingerprint":"[^"]*"', b'"system_fingerprint":"VERSION"'),
)


def chat(text: str, *, whole: bool = True, finish: FinishReason = FinishReason.STOP, **fields: Any) -> Posted:
    """A chat whose answer comes in one step, or in one for each byte."""
    posted = Posted("chat", tokenizer=RICH, **fields)
    for index in range(posted.params.n):
        posted.say(text, index=index, finish=finish, whole=whole)
    return posted.end()


def stopped_chat() -> Posted:
    return Posted("chat", tokenizer=RICH, stop=["x"]).answered("ok", stop="x")


def failing_chat() -> Posted:
    posted = Posted("chat", tokenizer=RICH, stream=True)
    posted.say("ok")
    posted.engine.submitted[0].sink.fail(StepFailedError("The step failed."))
    return posted


def completion(text: str, *, whole: bool = True, **fields: Any) -> Posted:
    posted = Posted("completions", tokenizer=RICH, **fields)
    for prompt, submitted in enumerate(list(posted.engine.submitted)):
        for index in range(submitted.params.n):
            posted.say(text, index=index, prompt=prompt, finish=FinishReason.STOP, whole=whole)
    return posted.end()


CASES: dict[str, Callable[[], Posted]] = {
    "chat_stream": lambda: chat('é"\u2028!', whole=False, stream=True),
    "chat_stream_usage": lambda: chat("ok", whole=False, **USAGE),
    "chat_stream_continuous_usage": lambda: chat("ok", whole=False, **CONTINUOUS),
    "chat_stream_choices": lambda: chat("ok", n=2, stream=True),
    "chat_stream_length": lambda: chat("ok", finish=FinishReason.LENGTH, stream=True),
    "chat_stream_empty": lambda: chat("", stream=True),
    "chat_stream_tools": lambda: chat(CALLS, stream=True, tools=[TOOL]),
    "chat_stream_tool_pieces": lambda: chat(CALL, whole=False, stream=True, tools=[TOOL]),
    "chat_stream_function_call": lambda: chat(CALL, stream=True, functions=[TOOL["function"]]),
    "chat_stream_reasoning": lambda: chat(REASONED, stream=True),
    "chat_stream_logprobs": lambda: chat("é!", whole=False, stream=True, logprobs=True, top_logprobs=1),
    "chat_stream_token_ids": lambda: chat("ok", whole=False, stream=True, return_token_ids=True),
    "chat_stream_warnings": lambda: chat("ok", n=2, stream=True, store=True, service_tier="flex"),
    "chat_stream_failure": failing_chat,
    "chat_whole": lambda: chat("ok", n=2),
    "chat_whole_stopped": stopped_chat,
    "chat_whole_tools": lambda: chat(CALLS, tools=[TOOL]),
    "chat_whole_function_call": lambda: chat(CALL, functions=[TOOL["function"]]),
    "chat_whole_reasoning": lambda: chat(REASONED),
    "chat_whole_logprobs": lambda: chat("é!", logprobs=True, top_logprobs=2),
    "chat_whole_logprobs_as_ids": lambda: chat("ok", logprobs=True, return_tokens_as_token_ids=True),
    "chat_whole_prompt_logprobs": lambda: chat("ok", prompt_logprobs=1),
    "chat_whole_token_ids": lambda: chat("ok", return_token_ids=True),
    "chat_whole_warnings": lambda: chat("ok", store=True, chat_template_kwargs={"x": 1}),
    "completion_stream": lambda: completion("ok", whole=False, **USAGE),
    "completion_stream_echo": lambda: completion("ok", stream=True, echo=True, prompt=["Hé", "you"]),
    "completion_stream_echo_logprobs": lambda: completion(
        "é", whole=False, stream=True, echo=True, logprobs=1, prompt="Hi"
    ),
    "completion_stream_token_ids": lambda: completion("ok", n=2, stream=True, return_token_ids=True),
    "completion_stream_warnings": lambda: completion("ok", stream=True, store=True),
    "completion_whole": lambda: completion("ok", n=2, prompt=["Hi", "you"]),
    "completion_whole_echo": lambda: completion("ok", echo=True, prompt=[40, 41]),
    "completion_whole_echo_logprobs": lambda: completion("é!", echo=True, logprobs=1, prompt="Hi"),
    "completion_whole_prompt_logprobs": lambda: completion("ok", n=2, prompt_logprobs=0, prompt="Hi"),
    "completion_whole_token_ids": lambda: completion("ok", return_token_ids=True, prompt="Hi"),
}


def answer(name: str) -> bytes:
    """The answer's body with what differs from run to run replaced."""
    body = CASES[name]().body
    for pattern, replacement in _REPLACED:
        body = re.sub(pattern, replacement, body)
    return body if body.endswith(b"\n") else body + b"\n"


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.txt"
