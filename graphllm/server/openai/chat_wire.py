"""The shapes of /v1/chat/completions.

Reasoning goes out as `reasoning_content` (DeepSeek's and SGLang's name) and `reasoning` (vLLM's and
OpenRouter's), both with the same text. Requests of the older form, with `functions`, get `function_call`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from graphllm.server import sse
from graphllm.server.generation.logprobs import TokenScore, chat_logprobs
from graphllm.server.generation.wire import Choice, ChunkExtras, ToolCall
from graphllm.server.openai.choice_wire import ChoiceWire, WireOptions
from graphllm.tokenizer.tokenizer import Tokenizer


class ChatWire(ChoiceWire):
    """One chat completion."""

    _text_open = b'"delta":{"content":'
    _text_close = b"}"
    _no_text = b'"delta":{}'

    def __init__(self, tokenizer: Tokenizer, options: WireOptions) -> None:
        super().__init__(
            "chatcmpl",
            "chat.completion",
            chunk_name="chat.completion.chunk",
            tokenizer=tokenizer,
            options=options,
        )
        self._has_shown_prompt = False

    def new_call_id(self) -> str:
        return f"call_{uuid4().hex[:24]}"

    def opening(self, choice: Choice) -> bytes:
        members = self._opening_members(choice)
        if self._options.token_ids and not self._has_shown_prompt:
            self._has_shown_prompt = True
            members["prompt_token_ids"] = self._options.prompts[0]
        return self._chunk(
            choice,
            b'"delta":{"role":"assistant","content":""}',
            extras=self._opening_extras(),
            members=members,
        )

    def reasoning(self, choice: Choice, text: str, *, extras: ChunkExtras | None) -> bytes:
        encoded = sse.encode_text(text)
        middle = b'"delta":{"reasoning_content":%b,"reasoning":%b}' % (encoded, encoded)
        return self._chunk(choice, middle, extras=extras)

    def tool_call_start(self, choice: Choice, call: ToolCall, *, extras: ChunkExtras | None) -> bytes:
        function = {"name": call.name, "arguments": ""}
        if self._options.legacy_function_call:
            delta: dict[str, Any] = {"function_call": function}
        else:
            entry = {"index": call.index, "id": call.call_id, "type": "function", "function": function}
            delta = {"tool_calls": [entry]}
        return self._chunk(choice, b'"delta":' + sse.encode_json(delta), extras=extras)

    def tool_call_arguments(
        self, choice: Choice, call: ToolCall, text: str, *, extras: ChunkExtras | None
    ) -> bytes:
        encoded = sse.encode_text(text)
        if self._options.legacy_function_call:
            middle = b'"delta":{"function_call":{"arguments":%b}}' % encoded
        else:
            entry = b'{"index":%d,"function":{"arguments":%b}}' % (call.index, encoded)
            middle = b'"delta":{"tool_calls":[%b]}' % entry
        return self._chunk(choice, middle, extras=extras)

    def _logprobs(self, choice: Choice, logprobs: Sequence[TokenScore]) -> dict[str, Any]:
        entries = [entry for entry in logprobs if not isinstance(entry, int)]
        content = chat_logprobs(self._tokenizer, entries, tokens_as_ids=self._options.tokens_as_ids)
        return {"content": content, "refusal": None}

    def _whole_text(self, choice: Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        calls = [{"name": call.name, "arguments": call.arguments_json} for call in choice.tool_calls]
        if calls:
            message["content"] = text or None
        if calls and self._options.legacy_function_call:
            message["function_call"] = calls[0]
        elif calls:
            message["tool_calls"] = [
                {"id": call.call_id, "type": "function", "function": function}
                for call, function in zip(choice.tool_calls, calls, strict=True)
            ]
        if choice.reasoning:
            reasoning = "".join(choice.reasoning)
            message["reasoning_content"] = message["reasoning"] = reasoning
        return {"message": message}

    def _whole_extras(self) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        if self._options.token_ids:
            extras["prompt_token_ids"] = self._options.prompts[0]
        if self._options.prompt_logprobs:
            extras["prompt_logprobs"] = self._prompt_logprobs_json[0]
        return extras
