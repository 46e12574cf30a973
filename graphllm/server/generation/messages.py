"""From the messages of a chat to what this model's template renders.

Owns what a template understands, and what becomes of a message that it does not. A name that the template
does not read is left out with a warning: frameworks put one on every message of an agent. The role
`developer` becomes `system` for templates that do not know it; both mean instructions that outrank the
user's. Tool calls and their results become plain text for templates that know no tools. Reasoning of earlier
turns goes to templates that read it, and is left out with a warning where none does: models are not meant to
see it then.

Messages are dicts: role, content (text), and where they apply name, tool_calls (OpenAI's form, with the
arguments as an object), tool_call_id and reasoning_content.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from graphllm.errors import InvalidRequestError
from graphllm.server.generation.request import RequestWarning
from graphllm.tokenizer.chat_template import ChatTemplate

ROLES = ("system", "developer", "user", "assistant", "tool")
# The keys under which templates read the reasoning of earlier turns.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# `message.name`, `message['name']` or `messages[0]["name"]`, but not `tool.function.name`.
_READS_NAME = re.compile(r"\b(?:m|msg|messages?)(?:\[[^\]]*\])?(?:\.name\b|\[['\"]name['\"]\])")
_KNOWS_TOOL_ROLE = re.compile(r"['\"]tool['\"]")


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateFeatures:
    """What a template reads, by its source and its variables.

    variables: the names it takes from outside, beside messages and tools. reasoning_keys: the keys of an
    assistant message under which it looks for earlier reasoning.
    """

    variables: frozenset[str]
    knows_tools: bool
    knows_tool_calls: bool
    knows_tool_role: bool
    knows_developer: bool
    reads_name: bool
    reasoning_keys: tuple[str, ...]

    @classmethod
    def of(cls, template: ChatTemplate) -> TemplateFeatures:
        source = "\n".join(template.sources.values())
        quoted = re.compile(r"(?:\.|['\"])(" + "|".join(REASONING_KEYS) + r")\b")
        found = set(quoted.findall(source))
        return cls(
            variables=template.variables,
            knows_tools="tools" in template.variables or "tool_use" in template.sources,
            knows_tool_calls="tool_calls" in source,
            knows_tool_role=_KNOWS_TOOL_ROLE.search(source) is not None,
            knows_developer="developer" in source,
            reads_name=_READS_NAME.search(source) is not None,
            reasoning_keys=tuple(key for key in REASONING_KEYS if key in found),
        )


def template_messages(
    messages: Sequence[Mapping[str, Any]], features: TemplateFeatures
) -> tuple[list[dict[str, Any]], list[RequestWarning]]:
    """The messages for the template, and what was left out: a warning for each key, naming the first message.

    Raises InvalidRequestError naming `messages[i]` and the key.
    """
    if not messages:
        raise InvalidRequestError("'messages' must not be empty.", param="messages")
    warnings: list[RequestWarning] = []
    rendered = [
        _template_message(message, f"messages[{position}]", features=features, warnings=warnings)
        for position, message in enumerate(messages)
    ]
    first_of_each = {warning.message: warning for warning in reversed(warnings)}
    return rendered, list(first_of_each.values())[::-1]


def _template_message(
    message: Mapping[str, Any], path: str, *, features: TemplateFeatures, warnings: list[RequestWarning]
) -> dict[str, Any]:
    role = message["role"]
    if role not in ROLES:
        raise InvalidRequestError(
            f"'{path}.role' must be one of {', '.join(ROLES)}, not {role[:40]!r}.", param=f"{path}.role"
        )
    if role == "developer" and not features.knows_developer:
        role = "system"
    if role == "tool" and not features.knows_tool_role:
        return {"role": "user", "content": _result_as_text(message)}
    rendered: dict[str, Any] = {"role": role, "content": message["content"]}
    name = message.get("name")
    if name is not None and features.reads_name:
        rendered["name"] = name
    elif name is not None and role != "tool":  # a result's call says already which function was called
        note = "this model's chat template reads no names; it was left out."
        warnings.append(RequestWarning(f"{path}.name", note))
    if (calls := message.get("tool_calls")) is not None:
        if features.knows_tool_calls:
            rendered["tool_calls"] = calls
        else:
            rendered["content"] = _calls_as_text(message["content"], calls)
    if (call_id := message.get("tool_call_id")) is not None:
        if role != "tool":
            raise InvalidRequestError(
                f"'{path}.tool_call_id' is only allowed in a message of role tool.",
                param=f"{path}.tool_call_id",
            )
        rendered["tool_call_id"] = call_id
    if (reasoning := message.get("reasoning_content")) is not None:
        for key in features.reasoning_keys:
            rendered[key] = reasoning
        if not features.reasoning_keys:
            note = "this model's chat template reads no reasoning of earlier turns; it was left out."
            warnings.append(RequestWarning(f"{path}.reasoning_content", note))
    return rendered


def _calls_as_text(content: str, calls: Sequence[Mapping[str, Any]]) -> str:
    """Calls as the generic format writes them, so that the model sees an example of what it should write."""
    lines = [orjson.dumps(call["function"]).decode() for call in calls]
    return "\n".join([content, *lines] if content else lines)


def _result_as_text(message: Mapping[str, Any]) -> str:
    source = message.get("name") or message.get("tool_call_id")
    return f"Result of {source}:\n{message['content']}" if source else f"Result:\n{message['content']}"
