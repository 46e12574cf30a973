"""What chunks and bodies of chat and text completions have in common: `choices`, usage, logprobs.

A streamed token costs a byte template and one JSON string; what does not change within a reply is encoded
once. `stop_reason` beside `finish_reason` is vLLM's, `matched_stop` SGLang's: the stop string or token id
that matched. Numbers that come by the thousand (log probabilities of whole answers) become JSON a few at a
time, before the body is put together.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar
from uuid import uuid4

import orjson

from graphllm.outputs import FinishReason, TokenLogprob
from graphllm.server import sse
from graphllm.server.generation.logprobs import TokenScore, prompt_logprobs_entry
from graphllm.server.generation.request import RequestWarning
from graphllm.server.generation.wire import SYSTEM_FINGERPRINT, Choice, ChunkExtras, Usage, Wire
from graphllm.tokenizer.tokenizer import Tokenizer

# Entries with their alternatives that become JSON in one go: a few tenths of a millisecond.
_SLICE_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class WireOptions:
    """What a reply needs to know of its request.

    include_usage, continuous_usage: `stream_options`. logprobs: whether any were asked for; of the prompt too
    where it is echoed. token_ids: whether each chunk says which tokens it is made of, and the first one the
    prompt's. prompts: the prompts' token ids, echoes: their texts, where anything shows them.
    """

    model: str
    include_usage: bool = False
    continuous_usage: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    tokens_as_ids: bool = False
    skip_special_tokens: bool = True
    token_ids: bool = False
    legacy_function_call: bool = False
    prompts: Sequence[list[int]] = ()
    echoes: Sequence[str] | None = None
    num_choices_per_prompt: int = 1
    warnings: tuple[RequestWarning, ...] = ()


class ChoiceWire(Wire):
    """One reply with `choices`. Frames and bodies share the identity before and the end after them."""

    # A chunk's text: what comes before and after the JSON string, and what stands for no text.
    _text_open: ClassVar[bytes]
    _text_close: ClassVar[bytes]
    _no_text: ClassVar[bytes]

    def __init__(
        self, id_prefix: str, object_name: str, *, chunk_name: str, tokenizer: Tokenizer, options: WireOptions
    ) -> None:
        super().__init__(f"{id_prefix}-{uuid4().hex}")
        self.wants_logprobs = options.logprobs
        self.wants_token_ids = options.token_ids
        self.wants_running_usage = options.continuous_usage
        self._tokenizer = tokenizer
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
        self._first_usage: Usage | None = None
        self._has_warned = False
        # By choice, and by prompt: what `preparation` made.
        self._logprobs_json: dict[int, dict[str, Any]] = {}
        self._prompt_logprobs_json: dict[int, orjson.Fragment] = {}

    def begin(self, usage: Usage) -> bytes:
        # The first chunks carry no text yet, whatever the step that brought them has sampled.
        self._first_usage = replace(usage, completion_tokens=0, reasoning_tokens=0)
        return b""

    def text(self, choice: Choice, text: str, *, extras: ChunkExtras | None) -> bytes:
        if extras is not None:
            return self._chunk(
                choice, self._text_open + sse.encode_text(text) + self._text_close, extras=extras
            )
        template = self._templates.get(choice.index)
        if template is None:
            template = self._templates[choice.index] = sse.ChunkTemplate(
                b'%b{"index":%d,%b' % (self._head, choice.index, self._text_open),
                b'%b,"logprobs":null,"finish_reason":null%b' % (self._text_close, self._tail),
            )
        return template.render(text)

    def closing(self, choice: Choice, *, extras: ChunkExtras | None) -> bytes:
        return self._chunk(choice, self._no_text, extras=extras, ending=self._ending(choice))

    def end(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """The frame with the usage and no choices, if it was asked for, and the stream's last event."""
        if not self._options.include_usage:
            return sse.DONE
        return b'%b],"usage":%b}\n\n' % (self._head, orjson.dumps(usage.as_json())) + sse.DONE

    def preparation(self, choices: Sequence[Choice]) -> Iterator[None]:
        for choice in choices:
            prompt = self._prompt_of(choice)
            if self._options.logprobs:
                parts = _JsonLists()
                for scores in _slices(self._scores(choice)):
                    parts.add(self._logprobs(choice, scores))
                    yield
                self._logprobs_json[choice.index] = parts.whole()
            if self._options.prompt_logprobs and prompt not in self._prompt_logprobs_json:
                parts = _JsonLists()
                for entries in _slices(choice.prompt_logprobs or ()):
                    parts.add({"": [prompt_logprobs_entry(self._tokenizer, entry) for entry in entries]})
                    yield
                self._prompt_logprobs_json[prompt] = parts.whole().get("", orjson.Fragment(b"[]"))

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        body = {
            **self._identity,
            "choices": [self._whole_choice(choice) for choice in choices],
            "usage": usage.as_json(),
            **self._whole_extras(),
        }
        if self._options.warnings:
            body["warnings"] = self._warnings()
        return sse.encode_json(body)

    def _chunk(
        self,
        choice: Choice,
        middle: bytes,
        *,
        extras: ChunkExtras | None = None,
        scores: Sequence[TokenScore] | None = None,
        ending: dict[str, Any] | None = None,
        members: Mapping[str, Any] | None = None,
    ) -> bytes:
        """A frame. middle: the JSON member, or members, that hold what is new. members: beside `choices`.

        scores: tokens for `logprobs` that are not among the extras.
        """
        parts = [b'%b{"index":%d,%b' % (self._head, choice.index, middle)]
        logprobs = extras.logprobs if extras is not None and scores is None else scores
        parts.append(
            b',"logprobs":%b' % (orjson.dumps(self._logprobs(choice, logprobs)) if logprobs else b"null")
        )
        parts.append(b',"finish_reason":null' if ending is None else b"," + orjson.dumps(ending)[1:-1])
        if extras is not None and extras.token_ids is not None:
            parts.append(b',"token_ids":%b' % orjson.dumps(extras.token_ids))
        tail = self._tail
        if extras is not None and extras.usage is not None:
            tail = b'}],"usage":%b}\n\n' % orjson.dumps(extras.usage.as_json())
        if members:
            tail = b"%b,%b}\n\n" % (tail.removesuffix(b"}\n\n"), orjson.dumps(members)[1:-1])
        parts.append(tail)
        return b"".join(parts)

    def _opening_extras(self) -> ChunkExtras | None:
        """What the first chunk of a choice carries: running usage, where every chunk does."""
        return ChunkExtras(usage=self._first_usage) if self.wants_running_usage else None

    def _opening_members(self, choice: Choice) -> dict[str, Any]:
        """What is said once, in the first chunk of all."""
        if self._has_warned or not self._options.warnings:
            return {}
        self._has_warned = True
        return {"warnings": self._warnings()}

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        entry = {
            "index": choice.index,
            **self._whole_text(choice),
            "logprobs": self._logprobs_json.get(choice.index),
            **self._ending(choice),
        }
        if self._options.token_ids:
            entry["token_ids"] = choice.token_ids
        return entry

    def _whole_extras(self) -> dict[str, Any]:
        """Members of a whole body beside those that all have."""
        return {}

    def _ending(self, choice: Choice) -> dict[str, Any]:
        reason: str | None = choice.finish_reason
        if choice.called_tools and choice.finish_reason is FinishReason.STOP:
            reason = "function_call" if self._options.legacy_function_call else "tool_calls"
        return {
            "finish_reason": reason,
            "stop_reason": choice.stop_reason,
            "matched_stop": choice.stop_reason,
        }

    def _warnings(self) -> list[dict[str, str]]:
        return [warning.as_json() for warning in self._options.warnings]

    def _prompt_of(self, choice: Choice) -> int:
        return choice.index // self._options.num_choices_per_prompt

    def _scores(self, choice: Choice) -> Iterable[TokenScore]:
        """The tokens that a choice's `logprobs` are about."""
        return choice.logprobs

    @abstractmethod
    def _logprobs(self, choice: Choice, logprobs: Sequence[TokenScore]) -> dict[str, Any]: ...

    @abstractmethod
    def _whole_text(self, choice: Choice) -> dict[str, Any]: ...


class _JsonLists:
    """Lists of a JSON object that become JSON a part at a time; other members keep their last value."""

    def __init__(self) -> None:
        self._lists: dict[str, list[bytes]] = {}
        self._others: dict[str, Any] = {}

    def add(self, part: Mapping[str, Any]) -> None:
        for name, value in part.items():
            if not isinstance(value, list):
                self._others[name] = value
                continue
            pieces = self._lists.setdefault(name, [])
            if value:
                pieces.append(orjson.dumps(value)[1:-1])

    def whole(self) -> dict[str, Any]:
        lists = {name: orjson.Fragment(b"[%b]" % b",".join(pieces)) for name, pieces in self._lists.items()}
        return {**lists, **self._others}


def _slices(entries: Iterable[Any]) -> Iterator[Sequence[Any]]:
    """A few entries at a time, made as they are taken; once, with none, where there are none."""
    iterator = iter(entries)
    yield list(islice(iterator, _SLICE_TOKENS))
    while part := list(islice(iterator, _SLICE_TOKENS)):
        yield part


def scores_of_prompt(
    token_ids: Sequence[int], scores: Sequence[TokenLogprob | None] | None
) -> Iterator[TokenScore]:
    """An echoed prompt's tokens as `logprobs` show them; the first has no log probability.

    One at a time: all those of a long prompt take hundreds of milliseconds to make.
    """
    if scores is None:
        yield from token_ids
        return
    for token_id, score in zip(token_ids, scores, strict=True):
        yield token_id if score is None else score
