"""Fields that an API knows and this server does not honour, and what happens to them.

A client may send such a field with a value that asks for nothing (`audio: null`): it is accepted and
dropped. Any other value is refused by name, or, where ignoring it does no harm, accepted with an entry in
the answer's `warnings`. So nobody believes that it was honoured. The tables are the dialects'.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphllm.errors import InvalidRequestError
from graphllm.server.generation.request import RequestWarning

_FIELD = re.compile(r"[a-z_]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownField:
    """neutral: the values besides null that ask for nothing. note: what a user should know, one sentence.

    is_tolerated: other values are accepted with the note as a warning, instead of refused.
    """

    note: str
    neutral: tuple[Any, ...] = ()
    is_tolerated: bool = False

    def asks_for_nothing(self, value: Any) -> bool:
        # Types are compared too: 0 == False and 1 == True in Python, not in JSON.
        return value is None or any(type(value) is type(other) and value == other for other in self.neutral)


def renamed(error: InvalidRequestError, names: Mapping[str, str]) -> InvalidRequestError:
    """The error in a dialect's words.

    names: from the field that the shared code names (`max_tokens`) to the client's (`max_output_tokens`). Of
    a path such as `messages[2].name` only the field remains: a dialect's messages are counted otherwise.
    """
    error.param, error.message = _in_words_of(names, error.param, error.message)
    return error


def renamed_warning(warning: RequestWarning, names: Mapping[str, str]) -> RequestWarning:
    """A warning in a dialect's words, like `renamed`."""
    field, message = _in_words_of(names, warning.field, warning.message)
    return RequestWarning(field or warning.field, message)


def _in_words_of(names: Mapping[str, str], field: str | None, message: str) -> tuple[str | None, str]:
    match = _FIELD.match(field or "")
    name = names.get(match[0]) if match is not None else None
    if match is None or name is None:
        return field, message
    return name, re.sub(rf"\b{match[0]}\b(?:\[\d+\])?", lambda _: name, message)
