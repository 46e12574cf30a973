"""From the items of a conversation to the messages that a chat template renders.

An assistant's reasoning, text and calls are separate items and one message. Items are in the stored form
(`input_items.py` and `output_items.py` make them), so nothing here can be wrong any more. The same items
always give the same messages, so that a conversation that goes on begins with the same tokens and is found
in the prefix cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import orjson

from graphllm.server.openai.responses.store import Turn


def stored_items(turn: Turn | None, *, max_bytes: int) -> tuple[list[dict[str, Any]], bool]:
    """The items of a conversation up to and including a turn, input and output, in order.

    max_bytes: of their JSON; only the newest turns within it are read, at least one. Returns the items, and
    whether they are all.
    """
    turns: list[Turn] = []
    num_bytes = 0
    while turn is not None:
        num_bytes += len(turn.input_items) + len(turn.output_items)
        if turns and num_bytes > max_bytes:
            break
        turns.append(turn)
        turn = turn.previous
    items: list[dict[str, Any]] = []
    for each in reversed(turns):
        items += orjson.loads(each.input_items)
        items += orjson.loads(each.output_items)
    return items, turn is None


def call_ids(items: Iterable[dict[str, Any]]) -> set[str]:
    return {item["call_id"] for item in items if item["type"] == "function_call"}


def arguments_object(text: str) -> dict[str, Any] | None:
    """The arguments of a call, None for what is no JSON object: the model was cut."""
    if not text.strip():
        return {}  # so clients put the stream of a call without arguments together
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        return None


def messages_of(items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages in the form that templates read. A call that was cut short, and so never made, is left out."""
    messages: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    assistant: dict[str, Any] | None = None
    for item in items:
        item_type = item["type"]
        is_assistants = item_type in ("reasoning", "function_call") or item.get("role") == "assistant"
        if is_assistants:
            if assistant is None or _begins_anew(item_type, assistant):
                assistant = {"role": "assistant", "content": ""}
                messages.append(assistant)
            _extend(assistant, item, names)
            continue
        assistant = None
        if item_type == "function_call_output":
            messages.append(
                {
                    "role": "tool",
                    "tool_call_id": item["call_id"],
                    "name": names.get(item["call_id"]),
                    "content": _text(item["output"]),
                }
            )
        else:
            messages.append({"role": item["role"], "content": _text(item["content"])})
    return [message for message in messages if not _says_nothing(message)]


def _begins_anew(item_type: str, assistant: dict[str, Any]) -> bool:
    """Whether an item cannot belong to the message: reasoning, text and calls come in that order."""
    if item_type == "function_call":
        return False
    if assistant["content"] or "tool_calls" in assistant:
        return True
    return item_type == "reasoning" and "reasoning_content" in assistant


def _extend(assistant: dict[str, Any], item: dict[str, Any], names: dict[str, str]) -> None:
    match item["type"]:
        case "reasoning":
            text = _text(item.get("content") or item["summary"])
            if text:
                assistant["reasoning_content"] = text
        case "function_call":
            arguments = arguments_object(item["arguments"])
            was_cut = item["status"] == "incomplete" and not item["arguments"].strip()
            if arguments is None or was_cut:
                return
            names[item["call_id"]] = item["name"]
            assistant.setdefault("tool_calls", []).append(
                {
                    "id": item["call_id"],
                    "type": "function",
                    "function": {"name": item["name"], "arguments": arguments},
                }
            )
        case _:
            assistant["content"] = _text(item["content"])


def _says_nothing(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and not (
        message["content"] or message.get("tool_calls") or message.get("reasoning_content")
    )


def _text(content: str | list[dict[str, Any]]) -> str:
    """Parts are joined by a newline, as in chat completions."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
