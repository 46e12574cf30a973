"""`truncation: auto`: the oldest messages make room where a conversation does not fit the context.

Owns which messages go. Instructions at the beginning stay, and what is left begins with a user's message, so
that no answer or result stands without what it answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from graphllm.errors import ContextLengthError
from graphllm.server.generation.chat import PreparedChat

# What a template puts around a message, roughly; the exact number is known when it has been rendered.
TOKENS_AROUND_MESSAGE = 6

Message = dict[str, Any]


def prepare_truncated(
    messages: Sequence[Message],
    *,
    prepare: Callable[[list[Message]], PreparedChat],
    count_tokens: Callable[[str, int], int],
    max_tokens: int,
) -> PreparedChat:
    """Prepare the chat with as many of its newest messages as fit in `max_tokens`.

    count_tokens: of a text, at most the number given. Raises ContextLengthError when the newest does not fit
    by itself, and what `prepare` raises otherwise.
    """
    try:
        prepared = prepare(list(messages))
        if len(prepared.generation.prompts[0]) <= max_tokens:
            return prepared
    except ContextLengthError:
        pass
    num_leading = _num_leading_instructions(messages)
    leading, rest = list(messages[:num_leading]), list(messages[num_leading:])
    first = _first_that_fits(leading, rest, count_tokens=count_tokens, max_tokens=max_tokens)
    # The estimate may be a little off; a second and further tries drop twice as much as the one before.
    num_more = 1
    while True:
        first = _next_user_message(rest, first)
        try:
            prepared = prepare(leading + rest[first:])
            if len(prepared.generation.prompts[0]) <= max_tokens or first >= len(rest) - 1:
                return prepared  # where the last one does not fit, the engine says so
        except ContextLengthError:
            if first >= len(rest) - 1:
                raise
        first = min(first + num_more, len(rest) - 1)
        num_more *= 2


def _num_leading_instructions(messages: Sequence[Message]) -> int:
    for position, message in enumerate(messages):
        if message["role"] not in ("system", "developer"):
            return position
    return 0  # nothing but instructions: all but the last may go


def _first_that_fits(
    leading: Sequence[Message],
    rest: Sequence[Message],
    *,
    count_tokens: Callable[[str, int], int],
    max_tokens: int,
) -> int:
    """Counts from the newest message on, and stops where the room ends: the work is bounded by it."""
    room = max_tokens
    for message in leading:
        room -= count_tokens(message["content"], max_tokens) + TOKENS_AROUND_MESSAGE
    first = len(rest)
    while first > 0 and room > 0:
        message = rest[first - 1]
        room -= count_tokens(message["content"], max_tokens) + TOKENS_AROUND_MESSAGE
        if room < 0:
            break
        first -= 1
    return min(first, len(rest) - 1)


def _next_user_message(rest: Sequence[Message], first: int) -> int:
    """The first user's message from `first` on; the last message where there is none."""
    for position in range(first, len(rest)):
        if rest[position]["role"] == "user":
            return position
    return len(rest) - 1
