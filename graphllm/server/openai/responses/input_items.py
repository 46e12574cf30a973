"""Input items as a client sends them: checked, and brought into the one form that is stored and shown.

Owns what an item may be. What a conversation of items means to a chat template is `conversation.py`'s. Item
types that belong to tools which this server does not run are refused by name, and so are images and files.
"""

from __future__ import annotations

from collections.abc import Collection
from random import getrandbits
from typing import Any, Literal

import msgspec

from graphllm.errors import InvalidRequestError, UnsupportedFieldError
from graphllm.server.generation.decoding import NestedReader
from graphllm.server.openai.responses.conversation import arguments_object

ROLES = ("user", "system", "developer", "assistant")
_TYPES = ("message", "function_call", "function_call_output", "reasoning")
_ID_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}

Status = Literal["in_progress", "completed", "incomplete"]


class Part(msgspec.Struct, forbid_unknown_fields=True):
    """A part of a message's content, or of a function's output."""

    type: str
    text: str | None = None
    refusal: str | None = None
    # Of answers that are sent back; they say nothing to the model.
    annotations: Any = None
    logprobs: Any = None
    prompt_cache_breakpoint: Any = None


class MessageItem(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str | list[dict[str, Any]]
    type: str | None = None
    id: str | None = None
    status: Status | None = None
    phase: Any = None


class FunctionCallItem(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None
    namespace: Any = None
    caller: Any = None
    created_by: Any = None
    is_async: bool | None = msgspec.field(default=None, name="async")


class FunctionCallOutputItem(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    call_id: str
    output: str | list[dict[str, Any]]
    id: str | None = None
    status: Status | None = None
    name: str | None = None
    namespace: Any = None
    caller: Any = None
    created_by: Any = None


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    text: str


class ReasoningItem(msgspec.Struct, forbid_unknown_fields=True):
    """Either kind of text may be missing: a summary is what a client was sent instead of the content."""

    type: str
    id: str | None = None
    summary: list[TextPart] = []
    content: list[TextPart] | None = None
    encrypted_content: str | None = None
    status: Status | None = None


def checked_items(
    value: str | list[dict[str, Any]], *, known_call_ids: Collection[str], reader: NestedReader
) -> list[dict[str, Any]]:
    """The items of a request's `input`, in the stored form.

    known_call_ids: of the function calls earlier in the conversation. Raises InvalidRequestError or
    UnsupportedFieldError naming `input[i]` and the key.
    """
    if isinstance(value, str):
        return [message_item("user", value)]
    call_ids = set(known_call_ids)
    items = []
    for position, item in enumerate(value):
        checked = _checked_item(item, f"input[{position}]", reader=reader)
        if checked["type"] == "function_call":
            call_ids.add(checked["call_id"])
        elif checked["type"] == "function_call_output" and checked["call_id"] not in call_ids:
            raise InvalidRequestError(
                f"'input[{position}].call_id': no function call before it has the id "
                f"{checked['call_id'][:80]!r}.",
                param=f"input[{position}].call_id",
            )
        items.append(checked)
    return items


def message_item(role: str, text: str) -> dict[str, Any]:
    """A message of one text."""
    return {
        "id": _new_id("message"),
        "type": "message",
        "status": "completed",
        "role": role,
        "content": [{"type": "input_text", "text": text}],
    }


def _new_id(item_type: str) -> str:
    # An item's id opens no door, so it need not be drawn by the system, which takes its time.
    return f"{_ID_PREFIXES[item_type]}_{getrandbits(128):032x}"


def _checked_item(item: dict[str, Any], path: str, *, reader: NestedReader) -> dict[str, Any]:
    item_type = item.get("type")
    if item_type is None and "role" in item:
        item_type = "message"
    match item_type:
        case "message":
            return _message(reader.read(item, MessageItem, path=path), path, reader=reader)
        case "function_call":
            return _function_call(reader.read(item, FunctionCallItem, path=path), path)
        case "function_call_output":
            output = reader.read(item, FunctionCallOutputItem, path=path)
            return _function_call_output(output, path, reader=reader)
        case "reasoning":
            return _reasoning(reader.read(item, ReasoningItem, path=path), path)
        case "item_reference":
            raise UnsupportedFieldError(
                f"'{path}.type': item references are not supported; send the item itself, or name the "
                "response that it came with as previous_response_id.",
                param=f"{path}.type",
            )
        case str():
            raise UnsupportedFieldError(
                f"'{path}.type': items of type {item_type[:60]!r} are not supported by this server; "
                f"{', '.join(_TYPES)} are.",
                param=f"{path}.type",
            )
        case _:
            raise InvalidRequestError(
                f"'{path}.type' must be one of {', '.join(_TYPES)}.", param=f"{path}.type"
            )


def _message(item: MessageItem, path: str, *, reader: NestedReader) -> dict[str, Any]:
    if item.role not in ROLES:
        raise InvalidRequestError(
            f"'{path}.role' must be one of {', '.join(ROLES)}, not {item.role[:40]!r}.", param=f"{path}.role"
        )
    _refuse(path, phase=item.phase)
    part_type = "output_text" if item.role == "assistant" else "input_text"
    content = item.content
    texts = [content] if isinstance(content, str) else _part_texts(content, f"{path}.content", reader=reader)
    parts: list[dict[str, Any]] = [{"type": part_type, "text": text} for text in texts]
    if part_type == "output_text":
        parts = [{**part, "annotations": []} for part in parts]
    return {
        "id": item.id or _new_id("message"),
        "type": "message",
        "status": item.status or "completed",
        "role": item.role,
        "content": parts,
    }


def _part_texts(parts: list[dict[str, Any]], path: str, *, reader: NestedReader) -> list[str]:
    if not parts:
        raise InvalidRequestError(f"'{path}' has no parts.", param=path)
    return [_part_text(part, f"{path}[{position}]", reader=reader) for position, part in enumerate(parts)]


def _part_text(part: dict[str, Any], path: str, *, reader: NestedReader) -> str:
    part_type = part.get("type")
    if isinstance(part_type, str) and part_type not in ("input_text", "output_text", "text", "refusal"):
        raise UnsupportedFieldError(
            f"'{path}.type': parts of type {part_type[:60]!r} are not supported by this server; "
            "only text is.",
            param=f"{path}.type",
        )
    checked = reader.read(part, Part, path=path)
    name = "refusal" if checked.type == "refusal" else "text"
    text = checked.refusal if name == "refusal" else checked.text
    if text is None:
        raise InvalidRequestError(f"Missing required field: '{path}.{name}'.", param=f"{path}.{name}")
    return text


def _function_call(item: FunctionCallItem, path: str) -> dict[str, Any]:
    _refuse(path, namespace=item.namespace, caller=_unless_direct(item.caller))
    if item.status != "incomplete" and arguments_object(item.arguments) is None:
        raise InvalidRequestError(
            f"'{path}.arguments' must be a JSON object in a string.", param=f"{path}.arguments"
        )
    return {
        "id": item.id or _new_id("function_call"),
        "type": "function_call",
        "status": item.status or "completed",
        "call_id": item.call_id,
        "name": item.name,
        "arguments": item.arguments,
    }


def _function_call_output(item: FunctionCallOutputItem, path: str, *, reader: NestedReader) -> dict[str, Any]:
    _refuse(path, namespace=item.namespace, caller=_unless_direct(item.caller))
    output: Any = item.output
    if not isinstance(output, str):
        texts = _part_texts(output, f"{path}.output", reader=reader)
        output = [{"type": "input_text", "text": text} for text in texts]
    return {
        "id": item.id or _new_id("function_call_output"),
        "type": "function_call_output",
        "status": item.status or "completed",
        "call_id": item.call_id,
        "output": output,
    }


def _reasoning(item: ReasoningItem, path: str) -> dict[str, Any]:
    if item.encrypted_content and not (item.content or item.summary):
        raise UnsupportedFieldError(
            f"'{path}.encrypted_content': this server cannot read another server's encrypted reasoning; "
            "send the item with its content, or leave it out.",
            param=f"{path}.encrypted_content",
        )
    stored: dict[str, Any] = {
        "id": item.id or _new_id("reasoning"),
        "type": "reasoning",
        "status": item.status or "completed",
        "summary": [{"type": "summary_text", "text": part.text} for part in item.summary],
    }
    if item.content is not None:
        stored["content"] = [{"type": "reasoning_text", "text": part.text} for part in item.content]
    return stored


def _unless_direct(caller: Any) -> Any:
    """A call is made by the model itself unless it says otherwise."""
    return None if caller == {"type": "direct"} else caller


def _refuse(path: str, **values: Any) -> None:
    for name, value in values.items():
        if value is not None:
            raise UnsupportedFieldError(
                f"'{path}.{name}' is not supported by this server.", param=f"{path}.{name}"
            )
