"""Stand-ins for what a unit test need not load: an engine without a model, a connection without a socket."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from graphllm.engine.sink import Sink
from graphllm.errors import ContextLengthError, GraphLLMError
from graphllm.models.pooling import PoolingConfig
from graphllm.sampling_params import SamplingParams

GENERATING = PoolingConfig(purpose="generate", method="last", hidden_size=4)


@dataclass(slots=True)
class Submitted:
    """A request as an engine was given it."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    sink: Sink
    cache_salt: str | None = None
    priority: int = 0
    pooling: bool = False
    lora: str | None = None


@dataclass(slots=True)
class FakeEngine:
    """Records requests; the test calls their sinks as the engine would.

    `refusal` is raised for the request numbered `refuse_at`.
    """

    submitted: list[Submitted] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    refusal: GraphLLMError | None = None
    refuse_at: int = 0
    tokenizer: FakeTokenizer | None = None
    max_model_len: int = 100
    adapters: tuple[str, ...] = ()
    pooling: PoolingConfig = GENERATING

    def check_generates(self) -> None:
        """It always does."""

    def check_ready(self) -> None:
        """It always is."""

    def has_adapter(self, name: str) -> bool:
        return name in self.adapters

    def add(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        *,
        params: SamplingParams,
        sink: Sink,
        cache_salt: str | None = None,
        priority: int = 0,
        pooling: bool = False,
        lora: str | None = None,
    ) -> None:
        if self.refusal is not None and len(self.submitted) == self.refuse_at:
            raise self.refusal
        self.submitted.append(
            Submitted(request_id, prompt_token_ids, params, sink, cache_salt, priority, pooling, lora)
        )

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


class FakeTokenizer:
    """Token `i` is the i-th of `tokens`; those of `special` are special.

    Encoding makes a token 1 of each character and takes `seconds_per_text`.
    """

    def __init__(
        self, tokens: list[bytes], *, special: frozenset[int] = frozenset(), seconds_per_text: float = 0.0
    ) -> None:
        self._tokens = tokens
        self._seconds_per_text = seconds_per_text
        self.vocab_size = len(tokens)
        self.special_token_ids = special
        self.appended_eos_id = None

    def encode(
        self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None, param: str = ""
    ) -> list[int]:
        time.sleep(self._seconds_per_text)
        if max_tokens is not None and len(text) > max_tokens:
            raise ContextLengthError(f"{len(text)} are more than {max_tokens}", param=param)
        return [1] * len(text)

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokens[token_id]


@dataclass(slots=True)
class RecordingChannel:
    """A connection that keeps what was written: one entry of `writes` for each write."""

    writes: list[bytes] = field(default_factory=list)
    is_ended: bool = False
    is_cut: bool = False
    is_draining: bool = False
    unread_bytes: int = 0

    @property
    def received(self) -> bytes:
        return b"".join(self.writes)

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def write_stream(self, data: bytes) -> None:
        self.writes.append(data)

    def end_response(self, *, keep_alive: bool) -> None:
        self.is_ended = True

    def cut_response(self, *, reset: bool) -> None:
        self.is_cut = True
