"""The messages of a chat as OpenAI's API writes them, and what they say in no dialect's words.

Owns the structs, which keys and content parts a message may have, and the older ways to write tool calls
(`function_call`, role `function`). What the model's template understands is judged in
`generation/messages.py`, where all dialects meet. Parts of a content list are joined by a newline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from graphllm.errors import InvalidRequestError, UnsupportedFieldError

_UNSUPPORTED_KEYS = ("audio", "annotations")


class FunctionCall(msgspec.Struct, forbid_unknown_fields=True):
    """The function an assistant message of the history called. arguments: a JSON object as text."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    """One tool call of an assistant message of the history. index: as streams number calls; not read."""

    function: FunctionCall
    id: str | None = None
    type: str | None = None
    index: int | None = None


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    """One message of a chat. Clients send whole assistant answers back, empty fields included."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    function_call: FunctionCall | None = None
    audio: Any = None
    annotations: Any = None


def plain_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """As `generation/messages.py` takes them: text, and arguments as objects.

    Raises InvalidRequestError or UnsupportedFieldError naming `messages[i]` and the key.
    """
    return [_plain_message(message, f"messages[{position}]") for position, message in enumerate(messages)]


def _plain_message(message: ChatMessage, path: str) -> dict[str, Any]:
    for key in _UNSUPPORTED_KEYS:
        # Empty values come from clients that send an earlier answer back as they got it.
        if getattr(message, key) not in (None, [], ""):
            raise UnsupportedFieldError(
                f"'{path}.{key}' is not supported by this server.", param=f"{path}.{key}"
            )
    is_assistant = message.role == "assistant"
    for key in ("tool_calls", "function_call", "refusal", "reasoning", "reasoning_content"):
        if getattr(message, key) and not is_assistant:
            raise InvalidRequestError(
                f"'{path}.{key}' is only allowed in a message of role assistant.", param=f"{path}.{key}"
            )
    # The older name of a tool's result; it carries the function's name instead of the call's id.
    plain: dict[str, Any] = {
        "role": "tool" if message.role == "function" else message.role,
        "content": _content(message, path),
    }
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    calls = [
        _plain_tool_call(call, f"{path}.tool_calls[{position}]")
        for position, call in enumerate(message.tool_calls or ())
    ]
    if message.function_call is not None:
        calls.append(_plain_function(message.function_call, f"{path}.function_call", call_id=None))
    if calls:
        plain["tool_calls"] = calls
    reasoning = message.reasoning_content or message.reasoning
    if reasoning:
        plain["reasoning_content"] = reasoning
    return plain


def _content(message: ChatMessage, path: str) -> str:
    content = message.content
    if isinstance(content, str):
        return content
    if content is None:
        has_more = (
            message.tool_calls or message.function_call or message.reasoning_content or message.reasoning
        )
        if message.role == "assistant" and (has_more or message.refusal):
            return message.refusal or ""
        raise InvalidRequestError(
            f"'{path}.content' must be a string or an array of parts, not null.", param=f"{path}.content"
        )
    if not content:
        raise InvalidRequestError(f"'{path}.content' has no parts.", param=f"{path}.content")
    return "\n".join(
        _part_text(part, f"{path}.content[{i}]", role=message.role) for i, part in enumerate(content)
    )


def _part_text(part: dict[str, Any], path: str, *, role: str) -> str:
    kind = part.get("type")
    if not isinstance(kind, str):
        raise InvalidRequestError(f"'{path}.type' must be a string.", param=f"{path}.type")
    key = "refusal" if kind == "refusal" and role == "assistant" else "text"
    if kind != key:
        raise UnsupportedFieldError(
            f"'{path}': content parts of type {kind[:40]!r} are not supported by this server; "
            "only 'text' is.",
            param=f"{path}.type",
        )
    text = part.get(key)
    if not isinstance(text, str):
        raise InvalidRequestError(f"'{path}.{key}' must be a string.", param=f"{path}.{key}")
    for name, value in part.items():
        if name not in ("type", key) and value is not None:
            shown = f"{path}.{name[:40]}"
            raise UnsupportedFieldError(f"'{shown}' is not supported by this server.", param=shown)
    return text


def _plain_tool_call(call: ToolCall, path: str) -> dict[str, Any]:
    if call.type not in (None, "function"):
        raise UnsupportedFieldError(
            f"'{path}.type' is {str(call.type)[:40]!r}; only 'function' is supported.", param=f"{path}.type"
        )
    return _plain_function(call.function, f"{path}.function", call_id=call.id)


def _plain_function(call: FunctionCall, path: str, *, call_id: str | None) -> dict[str, Any]:
    try:
        # Templates expect the arguments as an object and print them in their own style. An empty text is
        # what clients put together from the stream of a call without arguments.
        arguments = msgspec.json.decode(call.arguments.strip() or "{}", type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        raise InvalidRequestError(
            f"'{path}.arguments' must be a JSON object in a string.", param=f"{path}.arguments"
        ) from None
    return {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": arguments}}
