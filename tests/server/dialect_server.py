"""The real handlers of the responses and messages routes on a real tokenizer, without a model behind them.

A test asks, and plays the model by hand: it says what the engine would have generated.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphllm.errors import GraphLLMError
from graphllm.outputs import FinishReason, SequenceDelta
from graphllm.server.anthropic.errors import is_anthropic, speak_anthropic
from graphllm.server.anthropic.routes import Messages
from graphllm.server.error_responses import send_error
from graphllm.server.generation.served_model import ServedModel
from graphllm.server.http import Headers, Request, Response
from graphllm.server.openai.responses.create import CreateResponse
from graphllm.server.openai.responses.routes import StoredResponses
from graphllm.server.openai.responses.store import ResponseStore, StoreLimits
from graphllm.server.router import Router
from graphllm.tokenizer.tokenizer import Tokenizer
from tests.fakes import FakeEngine, RecordingChannel, Submitted
from tests.server.dialect_exchange import body_of, events_of
from tests.tiny_model import write_tiny_model

# Knows tools, calls, results and reasoning, in the manner of Qwen's.
CHAT_TEMPLATE = (
    "{% if tools %}[tools]{% for tool in tools %}{{ tool.function.name }};{% endfor %}\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n{% endif %}"
    "{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
    "{# 'tool' #}"
)


def write_tokenizer(folder: Path) -> Tokenizer:
    """A token a byte, and the template above."""
    write_tiny_model(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": CHAT_TEMPLATE}))
    return Tokenizer.from_folder(folder)


@dataclass
class Asked:
    """One request and its answer, which may not have come yet."""

    request: Request
    channel: RecordingChannel

    @property
    def status(self) -> int:
        return int(self.channel.received.split(b" ", 2)[1])

    @property
    def head(self) -> str:
        return self.channel.received.partition(b"\r\n\r\n")[0].decode()

    @property
    def json(self) -> Any:
        return json.loads(body_of(self.channel))

    @property
    def events(self) -> list[tuple[str, dict[str, Any]]]:
        return events_of(body_of(self.channel))


class DialectServer:
    def __init__(
        self, tokenizer: Tokenizer, *, max_model_len: int = 4096, lenient: bool = False, **limits: Any
    ) -> None:
        self.tokenizer = tokenizer
        real: Any = tokenizer
        self.engine = FakeEngine(tokenizer=real, max_model_len=max_model_len)
        engine: Any = self.engine
        served = ServedModel(engine, "tiny", lenient=lenient)
        self.store = ResponseStore(StoreLimits(**limits))
        self._router = router = Router()
        stored = StoredResponses(self.store)
        messages = Messages(served)
        router.add("POST", "/v1/responses", CreateResponse(served, self.store).create)
        router.add("GET", "/v1/responses/{id}", stored.retrieve)
        router.add("GET", "/v1/responses/{id}/input_items", stored.list_input)
        router.add("POST", "/v1/responses/{id}/cancel", stored.cancel)
        router.add("DELETE", "/v1/responses/{id}", stored.delete)
        router.add("POST", "/v1/messages", messages.create)
        router.add("POST", "/v1/messages/count_tokens", messages.count_tokens)

    def ask(self, method: str, target: str, body: Any = b"") -> Asked:
        """Errors are answered as the application does; other exceptions are the test's to see."""
        path, _, query = target.partition("?")
        request = Request(
            method=method,
            raw_path=path.encode(),
            query=query.encode(),
            http_version="1.1",
            headers=Headers(),
            body=body if isinstance(body, bytes) else json.dumps(body).encode(),
            keep_alive=True,
        )
        asked = Asked(request, RecordingChannel())
        response = Response(asked.channel, method=method, http_version="1.1", keep_alive=True)
        if is_anthropic(path):
            speak_anthropic(response)
        try:
            self._router(request, response)
        except GraphLLMError as error:
            send_error(response, error)
        return asked

    @property
    def submitted(self) -> Submitted:
        """What the engine was last given."""
        return self.engine.submitted[-1]

    @property
    def prompt(self) -> str:
        """The text that the model was last asked to continue."""
        return self.tokenizer.decode(self.submitted.prompt_token_ids, skip_special_tokens=False)

    def say(
        self,
        *texts: str,
        end: FinishReason | None = FinishReason.STOP,
        stop_reason: str | int | None = None,
        to: Submitted | None = None,
    ) -> None:
        """The model's answer to the last request, a text a step."""
        sink = (to or self.submitted).sink
        for position, text in enumerate(texts):
            is_last = end is not None and position == len(texts) - 1
            sink.write(
                SequenceDelta(
                    index=0,
                    text=text,
                    token_ids=(65,),
                    logprobs=None,
                    finish_reason=end if is_last else None,
                    stop_reason=stop_reason if is_last else None,
                )
            )
            sink.flush()
        if end is not None:
            sink.finish()
