"""The shapes of /v1/completions; chunks and whole answers share one object name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import orjson

from graphllm.server import sse
from graphllm.server.generation.logprobs import CompletionLogprobs, TokenScore
from graphllm.server.generation.wire import Choice, ChunkExtras, ToolCall
from graphllm.server.openai.choice_wire import ChoiceWire, WireOptions, scores_of_prompt
from graphllm.tokenizer.tokenizer import Tokenizer


class CompletionWire(ChoiceWire):
    """One text completion, or one of each prompt of a batch."""

    _text_open = b'"text":'
    _text_close = b""
    _no_text = b'"text":""'

    def __init__(self, tokenizer: Tokenizer, options: WireOptions) -> None:
        super().__init__(
            "cmpl", "text_completion", chunk_name="text_completion", tokenizer=tokenizer, options=options
        )
        self._formatters: dict[int, CompletionLogprobs] = {}

    def opening(self, choice: Choice) -> bytes:
        """The prompt, where it is echoed; nothing where there is nothing to say before the first text."""
        options = self._options
        members = self._opening_members(choice)
        if not members and options.echoes is None and not options.token_ids:
            return b""
        middle = self._no_text
        if options.echoes is not None:
            middle = self._text_open + sse.encode_text(options.echoes[self._prompt_of(choice)])
        if options.token_ids:
            middle += b',"prompt_token_ids":%b' % orjson.dumps(options.prompts[self._prompt_of(choice)])
        has_scores = options.logprobs and options.echoes is not None
        return self._chunk(
            choice,
            middle,
            extras=self._opening_extras(),
            scores=list(self._prompt_scores(choice)) if has_scores else None,
            members=members,
        )

    def reasoning(self, choice: Choice, text: str, *, extras: ChunkExtras | None) -> bytes:
        raise AssertionError("a completion's text is not read")

    def tool_call_start(self, choice: Choice, call: ToolCall, *, extras: ChunkExtras | None) -> bytes:
        raise AssertionError("a completion's text is not read")

    def tool_call_arguments(
        self, choice: Choice, call: ToolCall, text: str, *, extras: ChunkExtras | None
    ) -> bytes:
        raise AssertionError("a completion's text is not read")

    def _scores(self, choice: Choice) -> Iterable[TokenScore]:
        if self._options.echoes is None:
            return choice.logprobs
        return chain(self._prompt_scores(choice), choice.logprobs)

    def _prompt_scores(self, choice: Choice) -> Iterator[TokenScore]:
        return scores_of_prompt(self._options.prompts[self._prompt_of(choice)], choice.prompt_logprobs)

    def _logprobs(self, choice: Choice, logprobs: Sequence[TokenScore]) -> dict[str, Any]:
        formatter = self._formatters.get(choice.index)
        if formatter is None:
            formatter = self._formatters[choice.index] = CompletionLogprobs(
                self._tokenizer,
                skip_special_tokens=self._options.skip_special_tokens,
                tokens_as_ids=self._options.tokens_as_ids,
            )
        return formatter.format(logprobs)

    def _whole_text(self, choice: Choice) -> dict[str, Any]:
        prompt = self._prompt_of(choice)
        echo = "" if self._options.echoes is None else self._options.echoes[prompt]
        entry: dict[str, Any] = {"text": echo + "".join(choice.text)}
        if self._options.token_ids:
            entry["prompt_token_ids"] = self._options.prompts[prompt]
        if self._options.prompt_logprobs:
            entry["prompt_logprobs"] = self._prompt_logprobs_json[prompt]
        return entry
