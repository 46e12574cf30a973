"""From the messages of a chat request to the dicts that a chat template renders.

Owns what a role, a content part and the optional keys of a message may be. A key that the model's
template does not read is refused instead of dropped: the client meant it to matter. The one
translation is of the role `developer`, which becomes `system` for templates that do not know it;
both mean instructions that outrank the user's. Parts of a content list are joined by a newline.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from graphllm.errors import InvalidRequestError, UnsupportedFieldError
from graphllm.server.openai.protocol import ChatMessage, ToolCall

ROLES = ("system", "developer", "user", "assistant", "tool")
_UNSUPPORTED_KEYS = ("refusal", "audio", "function_call", "annotations", "reasoning", "reasoning_content")
# `message.name`, `message['name']` or `messages[0]["name"]`, but not `tool.function.name`.
_READS_NAME = re.compile(r"\b(?:m|msg|messages?)(?:\[[^\]]*\])?(?:\.name\b|\[['\"]name['\"]\])")


def template_messages(messages: list[ChatMessage], template_source: str) -> list[dict[str, Any]]:
    """Raises InvalidRequestError or UnsupportedFieldError naming `messages[i]` and the key."""
    if not messages:
        raise InvalidRequestError("'messages' must not be empty.", param="messages")
    return [
        _template_message(message, f"messages[{position}]", template_source=template_source)
        for position, message in enumerate(messages)
    ]


def _template_message(message: ChatMessage, path: str, *, template_source: str) -> dict[str, Any]:
    role = message.role
    if role not in ROLES:
        raise InvalidRequestError(
            f"'{path}.role' must be one of {', '.join(ROLES)}, not {role[:40]!r}.", param=f"{path}.role"
        )
    for key in _UNSUPPORTED_KEYS:
        # Empty values come from clients that send an earlier answer back as they got it.
        if getattr(message, key) not in (None, [], ""):
            raise UnsupportedFieldError(
                f"'{path}.{key}' is not supported by this server.", param=f"{path}.{key}"
            )
    if role == "developer" and "developer" not in template_source:
        role = "system"
    rendered: dict[str, Any] = {"role": role, "content": _content(message, path)}
    if message.name is not None:
        _require(_READS_NAME.search(template_source) is not None, f"{path}.name")
        rendered["name"] = message.name
    if message.tool_calls:
        _require(role == "assistant" and "tool_calls" in template_source, f"{path}.tool_calls")
        rendered["tool_calls"] = [
            _template_tool_call(call, f"{path}.tool_calls[{position}]")
            for position, call in enumerate(message.tool_calls)
        ]
    if role == "tool":
        _require(re.search(r"['\"]tool['\"]", template_source) is not None, f"{path}.role")
    if message.tool_call_id is not None:
        if role != "tool":
            raise InvalidRequestError(
                f"'{path}.tool_call_id' is only allowed in a message of role tool.",
                param=f"{path}.tool_call_id",
            )
        rendered["tool_call_id"] = message.tool_call_id
    return rendered


def _require(understood: bool, path: str) -> None:
    if not understood:
        raise UnsupportedFieldError(
            f"'{path}': this model's chat template does not understand it.", param=path
        )


def _content(message: ChatMessage, path: str) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    if content is None:
        if message.role == "assistant" and message.tool_calls:
            return ""
        raise InvalidRequestError(
            f"'{path}.content' must be a string or an array of parts, not null.", param=f"{path}.content"
        )
    if not content:
        raise InvalidRequestError(f"'{path}.content' has no parts.", param=f"{path}.content")
    return "\n".join(_part_text(part, f"{path}.content[{i}]") for i, part in enumerate(content))


def _part_text(part: dict[str, Any], path: str) -> str:
    kind = part.get("type")
    if not isinstance(kind, str):
        raise InvalidRequestError(f"'{path}.type' must be a string.", param=f"{path}.type")
    if kind != "text":
        raise UnsupportedFieldError(
            f"'{path}': content parts of type {kind[:40]!r} are not supported by this server; "
            "only 'text' is.",
            param=f"{path}.type",
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidRequestError(f"'{path}.text' must be a string.", param=f"{path}.text")
    for key, value in part.items():
        if key not in ("type", "text") and value is not None:
            shown = f"{path}.{key[:40]}"
            raise UnsupportedFieldError(f"'{shown}' is not supported by this server.", param=shown)
    return text


def _template_tool_call(call: ToolCall, path: str) -> dict[str, Any]:
    if call.type not in (None, "function"):
        raise UnsupportedFieldError(
            f"'{path}.type' is {str(call.type)[:40]!r}; only 'function' is supported.", param=f"{path}.type"
        )
    try:
        # Templates expect the arguments as an object and print them in their own style.
        arguments = msgspec.json.decode(call.function.arguments, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        raise InvalidRequestError(
            f"'{path}.function.arguments' must be a JSON object in a string.",
            param=f"{path}.function.arguments",
        ) from None
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }
