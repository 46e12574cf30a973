"""A body posted to a real endpoint, with the test for an engine: it says what the model writes."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from tokenizers import AddedToken, decoders, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from graphllm.errors import GraphLLMError
from graphllm.outputs import FinishReason, SequenceDelta, TokenLogprob
from graphllm.sampling_params import SamplingParams
from graphllm.server.error_responses import send_error
from graphllm.server.generation.served_model import ServedModel
from graphllm.server.http import Headers, Request, Response
from graphllm.server.openai.chat_completions import ChatCompletions
from graphllm.server.openai.completions import Completions
from graphllm.server.openai.tokenization import Tokenization
from graphllm.server.response import Handler
from graphllm.tokenizer.detokenizer import IncrementalDetokenizer
from graphllm.tokenizer.source import TokenizerSource
from graphllm.tokenizer.tokenizer import Tokenizer
from tests.fakes import FakeEngine, RecordingChannel, Submitted

SPECIAL_TOKENS = ("<|end|>", "<|im_start|>", "<|im_end|>")
PLAIN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Knows tools, reads names and earlier reasoning, and can be told not to reason: as Qwen3's does.
RICH_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% if documents %}<|im_start|>documents\n{{ documents | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}"
    "{% if message.name %} {{ message.name }}{% endif %}\n"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>"
    "{% endfor %}{% if message.role == 'tool' %}({{ message.tool_call_id }}){% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
USER = [{"role": "user", "content": "Hi"}]
NEEDED: dict[str, dict[str, Any]] = {"chat": {"messages": USER}, "completions": {"prompt": "Hi"}}


@cache
def byte_tokenizer(
    template: str | None = PLAIN_TEMPLATE, *, special: tuple[str, ...] = (), adds_start: bool = False
) -> Tokenizer:
    """A token for each byte, and the special ones. adds_start: texts of their own begin with one of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in (*SPECIAL_TOKENS, *special)])
    if adds_start:
        backend.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 257)]
        )
    source = TokenizerSource(
        backend=backend,
        special_tokens={},
        bos_token_id=None,
        eos_token_ids=frozenset({256}),
        chat_templates={} if template is None else {"default": template},
    )
    return Tokenizer(source)


class Posted:
    """fields: the body beside what every body needs. path: which endpoint, see `handlers`."""

    def __init__(
        self,
        path: str = "chat",
        /,
        *,
        tokenizer: Tokenizer | None = None,
        served: Callable[[Any], ServedModel] = lambda engine: ServedModel(engine, "m"),
        body: bytes | None = None,
        max_model_len: int = 2000,
        **fields: Any,
    ) -> None:
        fake = FakeEngine(max_model_len=max_model_len)
        fake.tokenizer = tokenizer or byte_tokenizer()  # type: ignore[assignment]
        self.engine = fake
        self.channel = RecordingChannel()
        whole = {"model": "m", **NEEDED.get(path, {}), **fields}
        encoded = json.dumps(whole).encode() if body is None else body
        self.request = Request(
            method="POST",
            raw_path=b"/v1/" + path.encode(),
            query=b"",
            http_version="1.1",
            headers=Headers(),
            body=encoded,
            keep_alive=True,
        )
        response = Response(self.channel, method="POST", http_version="1.1", keep_alive=True)
        handlers: Mapping[str, Callable[[ServedModel], Handler]] = {
            "chat": lambda model: ChatCompletions(model).create,
            "completions": lambda model: Completions(model).create,
            "tokenize": lambda model: Tokenization(model).tokenize,
            "detokenize": lambda model: Tokenization(model).detokenize,
        }

        async def create() -> None:
            try:
                handlers[path](served(fake))(self.request, response)
            except GraphLLMError as error:
                send_error(response, error)
            while not (fake.submitted or self.channel.writes):
                await asyncio.sleep(0)  # prompts are tokenized in slices

        asyncio.run(create())
        self._detokenizers: dict[tuple[int, int], IncrementalDetokenizer] = {}

    # -- what the engine was asked -----------------------------------------------------------------

    @property
    def submitted(self) -> Submitted:
        assert not self.channel.writes, self.channel.received
        return self.engine.submitted[0]

    @property
    def params(self) -> SamplingParams:
        return self.submitted.params

    @property
    def prompt(self) -> str:
        """The first prompt as text, special tokens spelt out."""
        assert isinstance(self.engine.tokenizer, Tokenizer)
        return self.engine.tokenizer.decode(self.submitted.prompt_token_ids, skip_special_tokens=False)

    # -- what the model says -----------------------------------------------------------------------

    def say(
        self,
        text: str,
        *,
        index: int = 0,
        prompt: int = 0,
        finish: FinishReason | None = None,
        stop: str | int | None = None,
        whole: bool = False,
    ) -> Posted:
        """The model writes a text: a step for each token, or, with `whole`, one for all."""
        tokenizer = self.engine.tokenizer
        assert isinstance(tokenizer, Tokenizer)
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        steps = [token_ids] if whole else [[token_id] for token_id in token_ids]
        for number, step in enumerate(steps):
            is_last = number == len(steps) - 1
            self._step(step, index, prompt, finish if is_last else None, stop if is_last else None)
        if not steps:
            self._step([], index, prompt, finish, stop)
        return self

    def _step(
        self, token_ids: Sequence[int], index: int, prompt: int, finish: FinishReason | None, stop: Any
    ) -> None:
        submitted = self.engine.submitted[prompt]
        params, tokenizer = submitted.params, self.engine.tokenizer
        assert isinstance(tokenizer, Tokenizer)
        key = (prompt, index)
        is_first = key not in self._detokenizers
        if is_first:
            self._detokenizers[key] = IncrementalDetokenizer(
                tokenizer,
                submitted.prompt_token_ids,
                stop=(),
                skip_special_tokens=params.skip_special_tokens,
                include_stop_str_in_output=False,
                shown_special_token_ids=params.shown_special_token_ids,
            )
        text, _ = self._detokenizers[key].append(token_ids)
        logprobs = None
        if params.logprobs is not None:
            logprobs = tuple(scored(token_id, params.logprobs) for token_id in token_ids)
        prompt_logprobs: Any = None
        if params.prompt_logprobs is not None and is_first and index == 0:
            prompt_logprobs = [
                scored(token_id, params.prompt_logprobs, rank=7) if position else None
                for position, token_id in enumerate(submitted.prompt_token_ids)
            ]
        delta = SequenceDelta(
            index, text, tuple(token_ids), logprobs, finish, stop, prompt_logprobs=prompt_logprobs
        )
        submitted.sink.write(delta)
        submitted.sink.flush()

    def end(self) -> Posted:
        """All requests behind the answer have ended."""

        async def finish() -> None:
            for submitted in self.engine.submitted:
                submitted.sink.finish()
            while not self.channel.is_ended:
                await asyncio.sleep(0)  # long answers are written in slices

        asyncio.run(finish())
        return self

    def answered(self, text: str, *, stop: str | int | None = None) -> Posted:
        """The model writes this as every choice and stops."""
        for prompt, submitted in enumerate(list(self.engine.submitted)):
            for index in range(submitted.params.n):
                self.say(text, index=index, prompt=prompt, finish=FinishReason.STOP, stop=stop)
        return self.end()

    # -- what the client reads ---------------------------------------------------------------------

    @property
    def status(self) -> int:
        return int(self.channel.received.split(b" ", 2)[1])

    @property
    def body(self) -> bytes:
        """The answer's body; a chunked one put together."""
        head, _, body = self.channel.received.partition(b"\r\n\r\n")
        if b"Transfer-Encoding: chunked" not in head:
            return body
        whole = b""
        while match := re.match(rb"([0-9a-f]+)\r\n", body):
            size = int(match[1], 16)
            whole += body[match.end() : match.end() + size]
            body = body[match.end() + size + 2 :]
        return whole

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        assert self.status == 400, self.channel.received
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The JSON of every event but the last, which must be [DONE]."""
        *events, done, rest = self.body.split(b"\n\n")
        assert (done, rest) == (b"data: [DONE]", b"")
        return [json.loads(event.removeprefix(b"data: ")) for event in events]


def scored(token_id: int, num_top: int, *, rank: int | None = None) -> TokenLogprob:
    """Log probabilities that can be told apart: of the token itself, and of `num_top` others."""
    top = tuple((33 + position, -0.25 * (position + 1)) for position in range(num_top))
    return TokenLogprob(token_id, -1.5, top, rank)
