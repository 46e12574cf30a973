"""The bytes of answers: chunk frames and whole bodies, for chats and for text completions.

A streamed token costs a byte template and one JSON string; what does not change within a
reply is encoded once. Knows JSON and the API's shapes, nothing of connections or of the engine.
`stop_reason` beside `finish_reason` is vLLM's: the stop string or token id that matched.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar
from uuid import uuid4

import orjson

from graphllm import __version__
from graphllm.outputs import FinishReason, TokenLogprob
from graphllm.server import sse
from graphllm.server.openai.logprobs import CompletionLogprobs, chat_logprobs
from graphllm.tokenizer.tokenizer import Tokenizer

# Names the backend as far as it matters for repeating a seeded request.
SYSTEM_FINGERPRINT = f"graphllm-{__version__}"


@dataclass(slots=True)
class Choice:
    """One choice of a whole answer, as far as it has come."""

    index: int
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What an answer took; `cached_tokens` of the prompt tokens were not computed."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class WireOptions:
    """What a reply needs to know of its request. logprobs: whether any were asked for."""

    model: str
    include_usage: bool
    logprobs: bool
    skip_special_tokens: bool


class Wire(ABC):
    """One reply in an endpoint's shapes. Frames are whole server-sent events, ready for the socket.

    Frames and bodies share the identity before `choices` and the end after it.
    """

    # A chunk's text: what comes before and after the JSON string, and what stands for no text.
    _text_open: ClassVar[bytes]
    _text_close: ClassVar[bytes]
    _no_text: ClassVar[bytes]

    def __init__(self, id_prefix: str, object_name: str, *, chunk_name: str, options: WireOptions) -> None:
        self.reply_id = f"{id_prefix}-{uuid4().hex}"
        self._options = options
        self._identity = {
            "id": self.reply_id,
            "object": object_name,
            "created": int(time.time()),
            "model": options.model,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }
        identity = orjson.dumps({**self._identity, "object": chunk_name})
        self._head = b"data: " + identity[:-1] + b',"choices":['
        # OpenAI sends `usage: null` on every chunk but the last when usage was asked for.
        self._tail = b'}],"usage":null}\n\n' if options.include_usage else b"}]}\n\n"
        self._templates: dict[int, sse.ChunkTemplate] = {}

    @abstractmethod
    def opening(self, index: int) -> bytes:
        """The frame before the first text of a choice; may be empty."""

    def text(self, index: int, text: str, *, logprobs: list[TokenLogprob]) -> bytes:
        """A frame with more text of a choice, and the log probabilities of its tokens if asked for."""
        if logprobs:
            return self._template(index, self._encoded_logprobs(index, logprobs)).render(text)
        template = self._templates.get(index)
        if template is None:
            template = self._templates[index] = self._template(index, b"null")
        return template.render(text)

    def closing(
        self,
        index: int,
        finish_reason: FinishReason,
        *,
        stop_reason: str | int | None,
        logprobs: list[TokenLogprob],
    ) -> bytes:
        """The last frame of a choice, which has no text."""
        return b'%b{"index":%d,%b,"logprobs":%b,"finish_reason":"%b","stop_reason":%b%b' % (
            self._head,
            index,
            self._no_text,
            self._encoded_logprobs(index, logprobs) if logprobs else b"null",
            finish_reason.encode(),
            orjson.dumps(stop_reason),
            self._tail,
        )

    def usage(self, usage: Usage) -> bytes:
        """The frame with the usage and no choices."""
        return b'%b],"usage":%b}\n\n' % (self._head, orjson.dumps(usage.as_json()))

    def whole(self, choices: list[Choice], usage: Usage) -> bytes:
        """The body of an answer that is not streamed."""
        return orjson.dumps(
            {
                **self._identity,
                "choices": [
                    {
                        "index": choice.index,
                        **self._whole_text("".join(choice.text)),
                        "logprobs": self._logprobs(choice.index, choice.logprobs)
                        if self._options.logprobs
                        else None,
                        "finish_reason": choice.finish_reason,
                        "stop_reason": choice.stop_reason,
                    }
                    for choice in choices
                ],
                "usage": usage.as_json(),
            }
        )

    def _template(self, index: int, logprobs: bytes) -> sse.ChunkTemplate:
        return sse.ChunkTemplate(
            b'%b{"index":%d,%b' % (self._head, index, self._text_open),
            b'%b,"logprobs":%b,"finish_reason":null%b' % (self._text_close, logprobs, self._tail),
        )

    def _encoded_logprobs(self, index: int, logprobs: list[TokenLogprob]) -> bytes:
        return orjson.dumps(self._logprobs(index, logprobs))

    @abstractmethod
    def _logprobs(self, index: int, logprobs: list[TokenLogprob]) -> dict[str, Any]: ...

    @abstractmethod
    def _whole_text(self, text: str) -> dict[str, Any]: ...


class ChatWire(Wire):
    """Shapes of /v1/chat/completions."""

    _text_open = b'"delta":{"content":'
    _text_close = b"}"
    _no_text = b'"delta":{}'

    def __init__(self, tokenizer: Tokenizer, options: WireOptions) -> None:
        super().__init__("chatcmpl", "chat.completion", chunk_name="chat.completion.chunk", options=options)
        self._tokenizer = tokenizer

    def opening(self, index: int) -> bytes:
        return (
            b'%b{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null%b'
            % (self._head, index, self._tail)
        )

    def _logprobs(self, index: int, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        return {"content": chat_logprobs(self._tokenizer, logprobs), "refusal": None}

    def _whole_text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}


class CompletionWire(Wire):
    """Shapes of /v1/completions; chunks and whole answers share one object name."""

    _text_open = b'"text":'
    _text_close = b""
    _no_text = b'"text":""'

    def __init__(self, tokenizer: Tokenizer, options: WireOptions) -> None:
        super().__init__("cmpl", "text_completion", chunk_name="text_completion", options=options)
        self._tokenizer = tokenizer
        self._formatters: dict[int, CompletionLogprobs] = {}

    def opening(self, index: int) -> bytes:
        return b""

    def _logprobs(self, index: int, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        formatter = self._formatters.get(index)
        if formatter is None:
            formatter = self._formatters[index] = CompletionLogprobs(
                self._tokenizer, skip_special_tokens=self._options.skip_special_tokens
            )
        return formatter.format(logprobs)

    def _whole_text(self, text: str) -> dict[str, Any]:
        return {"text": text}
