"""Prefixes that are computed once and stay: system prompts that should cost no user anything.

Owns the list of pinned prefixes, how one is warmed (as a request of one token, in turn with all others), and
what the files of `--pin-prefix` mean. Which blocks stay is the scheduler's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from graphllm.engine.sink import Sink
from graphllm.errors import ConfigError, GraphLLMError, InvalidRequestError
from graphllm.outputs import SequenceDelta
from graphllm.sampling_params import SamplingParams
from graphllm.scheduler.scheduler import Scheduler
from graphllm.tokenizer.tokenizer import Tokenizer

_WARMING = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, seed=0)

AddRequest = Callable[[str, list[int], SamplingParams, Sink, str | None], None]
"""Queues a request: its id, tokens, parameters, sink and cache salt."""


@dataclass(frozen=True, slots=True)
class PinnedPrefix:
    """num_tokens: whole blocks of the prefix, which is what is kept."""

    id: str
    num_tokens: int
    num_blocks: int


class PinnedPrefixes:
    """What is pinned, by id."""

    def __init__(self, scheduler: Scheduler, add_request: AddRequest) -> None:
        self._scheduler = scheduler
        self._add_request = add_request
        self._pin_ids: dict[str, int] = {}
        self._pinned: dict[str, PinnedPrefix] = {}
        self._num_made = 0

    @property
    def pinned(self) -> list[PinnedPrefix]:
        """In the order in which they were pinned."""
        return list(self._pinned.values())

    async def pin(self, token_ids: list[int], cache_salt: str | None) -> PinnedPrefix:
        """Compute the prefix if need be, and keep it until `unpin`.

        Raises InvalidRequestError for a prefix that cannot be kept, and whatever its request fails with.
        """
        block_size = self._scheduler.block_manager.block_size
        num_tokens = len(token_ids) // block_size * block_size
        self._check(num_tokens, num_given=len(token_ids))
        token_ids = token_ids[:num_tokens]
        self._num_made += 1
        name = f"prefix-{self._num_made}"
        sink = _PinningSink(lambda: self._keep(name, token_ids, cache_salt))
        self._add_request(f"pin-{name}", token_ids, _WARMING, sink, cache_salt)
        return await sink.pinned

    def unpin(self, prefix_id: str) -> None:
        """Let the prefix be evicted again. Raises KeyError for an unknown id."""
        self._scheduler.unpin(self._pin_ids.pop(prefix_id))
        del self._pinned[prefix_id]

    def _num_blocks(self, num_tokens: int) -> int:
        """What a pinned prefix holds: of windowed layers, what the token behind it sees."""
        return self._scheduler.block_manager.layout.num_needed(num_tokens, num_settled=num_tokens)

    def _check(self, num_tokens: int, *, num_given: int) -> None:
        if not self._scheduler.limits.enable_prefix_caching:
            raise InvalidRequestError("Prefixes are cached with --enable-prefix-caching only.")
        if num_tokens == 0:
            raise InvalidRequestError(
                f"The prefix has {num_given} tokens, but needs at least one whole block of "
                f"{self._scheduler.block_manager.block_size}.",
                param="prompt",
            )
        num_blocks = self._num_blocks(num_tokens)
        # What is pinned already may be this prefix's own beginning: that is found out when it is computed.
        self._check_quota(num_blocks, num_pinned=self._scheduler.num_pinned_blocks, num_own=num_blocks)

    def _check_quota(self, num_blocks: int, *, num_pinned: int, num_own: int = 0) -> None:
        """Refuse a prefix that the quota has no room for; of the pinned blocks `num_own` may be its own."""
        quota = self._scheduler.limits.max_pinned_blocks
        if max(0, num_pinned - num_own) + num_blocks > quota:
            size = self._scheduler.block_manager.block_size
            raise InvalidRequestError(
                f"The prefix needs {num_blocks} KV blocks of {size} tokens; pinned prefixes may take {quota} "
                f"(--max-pinned-share), of which {num_pinned} are taken.",
                param="prompt",
            )

    def _keep(self, name: str, token_ids: list[int], cache_salt: str | None) -> PinnedPrefix:
        num_pinned = self._scheduler.num_pinned_blocks
        pin = self._scheduler.pin(token_ids, cache_salt)
        if pin.num_tokens < len(token_ids):
            self._scheduler.unpin(pin.pin_id)
            self._check_quota(self._num_blocks(len(token_ids)), num_pinned=num_pinned)
            raise GraphLLMError("The prefix was evicted before it was pinned: the KV cache is too full.")
        self._pin_ids[name] = pin.pin_id
        pinned = self._pinned[name] = PinnedPrefix(name, pin.num_tokens, len(pin.blocks))
        return pinned


class _PinningSink:
    """Pins at the very end of the request, before anything else can take the blocks."""

    def __init__(self, keep: Callable[[], PinnedPrefix]) -> None:
        self.pinned: asyncio.Future[PinnedPrefix] = asyncio.get_running_loop().create_future()
        self._keep = keep

    def write(self, delta: SequenceDelta) -> None:
        """The token is of no use."""

    def flush(self) -> None:
        """Nothing was written."""

    def finish(self) -> None:
        if self.pinned.done():  # nobody waits any more
            return
        try:
            self.pinned.set_result(self._keep())
        except Exception as error:  # a defect of ours too: whoever waits for the pin has to hear of it
            self.pinned.set_exception(error)

    def fail(self, error: GraphLLMError) -> None:
        if not self.pinned.done():
            self.pinned.set_exception(error)


def read_prefix_file(path: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a `--pin-prefix` file. Raises ConfigError, naming the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".json"):
            messages = orjson.loads(text)
            if not _are_messages(messages):
                raise ConfigError(f'--pin-prefix {path}: not a list of {{"role": ..., "content": ...}}.')
        elif tokenizer.chat_template is None:
            return tokenizer.encode(text)
        else:
            messages = [{"role": "system", "content": text}]
        return chat_prefix(messages, tokenizer)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--pin-prefix {path}: {error}") from error
    except InvalidRequestError as error:
        raise ConfigError(f"--pin-prefix {path}: {error.message}") from error


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in value
    )


def chat_prefix(
    messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *, max_tokens: int | None = None
) -> list[int]:
    """The tokens that every chat begins with that begins with these messages.

    What follows may change the last of them, and some templates refuse a chat without a user: so two chats
    that go on differently are compared. `max_tokens` bounds the chats, and with them the work.

    Raises InvalidRequestError, ContextLengthError.
    """
    if not messages:
        raise InvalidRequestError("The prefix has no messages.", param="messages")
    next_role = "assistant" if messages[-1]["role"] == "user" else "user"
    one, other = (
        tokenizer.encode_chat(
            [*messages, {"role": next_role, "content": word}],
            add_generation_prompt=False,
            max_tokens=max_tokens,
        )
        for word in ("Yes", "1")
    )
    num_common = next(
        (index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
        min(len(one), len(other)),
    )
    return one[:num_common]
