"""The names that a chat template reads beside messages and tools, and how much a model is to reason.

Owns the translation of `reasoning_effort` to the names that templates have for it, and what is said of names
that a template does not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graphllm.errors import InvalidRequestError, UnsupportedFieldError
from graphllm.server.generation.request import RequestWarning

REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
# Names under which templates are told whether to reason at all.
_SWITCHES = ("enable_thinking", "thinking")
_MAX_NAMES = 64
_MAX_SHOWN = 64


def template_names(
    given: Mapping[str, Any],
    *,
    variables: frozenset[str],
    documents: Sequence[Mapping[str, Any]] | None,
    reasoning_effort: str | None,
) -> tuple[dict[str, Any], list[RequestWarning]]:
    """The names for the template, and those that it does not read.

    given: the client's own, which outrank what is derived. variables: what the template reads. Raises
    InvalidRequestError (`reasoning_effort`, `chat_template_kwargs`), UnsupportedFieldError (`documents`).
    """
    if len(given) > _MAX_NAMES:
        raise InvalidRequestError(
            f"chat_template_kwargs has {len(given)} names; at most {_MAX_NAMES} are allowed.",
            param="chat_template_kwargs",
        )
    warnings = [
        RequestWarning(
            f"chat_template_kwargs.{name[:_MAX_SHOWN]}", "this model's chat template does not read it."
        )
        for name in given
        if name not in variables
    ]
    names: dict[str, Any] = {}
    if documents:
        if "documents" not in variables:
            raise UnsupportedFieldError(
                "'documents': this model's chat template reads none; put them into a message.",
                param="documents",
            )
        names["documents"] = documents
    if reasoning_effort is not None:
        if reasoning_effort not in REASONING_EFFORTS:
            raise InvalidRequestError(
                f"reasoning_effort must be one of {', '.join(REASONING_EFFORTS)}, "
                f"not {reasoning_effort[:40]!r}.",
                param="reasoning_effort",
            )
        derived = _effort_names(reasoning_effort, variables)
        if not derived:
            note = "this model's chat template cannot be told how much to reason."
            warnings.append(RequestWarning("reasoning_effort", note))
        names.update(derived)
    return {**names, **given}, warnings


def _effort_names(effort: str, variables: frozenset[str]) -> dict[str, Any]:
    names: dict[str, Any] = {name: effort != "none" for name in _SWITCHES if name in variables}
    # "none" is said by the switch where there is one.
    if "reasoning_effort" in variables and not (effort == "none" and names):
        names["reasoning_effort"] = effort
    return names


def thinks_by_default(variables: frozenset[str], names: Mapping[str, Any]) -> bool:
    """Whether a model reasons of its own accord: its template can switch that off, and was not told to."""
    return "enable_thinking" in variables and names.get("enable_thinking", True) is not False
