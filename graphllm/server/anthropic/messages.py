"""From Anthropic's messages and content blocks to messages that a chat template renders.

Owns what a block may be. A user's message may hold the results of tools, which become messages of their own;
an assistant's may hold thinking, text and calls, which are one. Messages of one role in a row are one turn,
as the API has it. A last message of the assistant is the beginning of the answer.

The messages made here are in the form of `generation/messages.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from graphllm.errors import InvalidRequestError, UnsupportedFieldError
from graphllm.server.anthropic.protocol import CacheControl
from graphllm.server.generation.decoding import NestedReader
from graphllm.server.generation.request import RequestWarning

_USER_BLOCKS = ("text", "tool_result")
_ASSISTANT_BLOCKS = ("text", "thinking", "redacted_thinking", "tool_use")


class MessageBody(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class TextBlock(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    text: str
    cache_control: CacheControl | None = None
    citations: list[Any] | None = None


class ThinkingBlock(msgspec.Struct, forbid_unknown_fields=True):
    """The signature is not checked: thinking is the client's to change, as any message is."""

    type: str
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    data: str


class ToolUseBlock(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: Any = None
    toolset_name: str | None = None


class ToolResultBlock(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    tool_use_id: str
    content: str | list[dict[str, Any]] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None
    toolset_name: str | None = None


@dataclass(slots=True)
class Conversation:
    """The messages so far. call_names: of every call's id, the function's name.

    The texts and the thinking of the last message are joined when it is complete (`close`): joined one by
    one, those of a message of very many blocks would be copied over and over.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    call_names: dict[str, str] = field(default_factory=dict)
    warnings: list[RequestWarning] = field(default_factory=list)
    _texts: list[str] = field(default_factory=list)
    _thinking: list[str] = field(default_factory=list)

    @property
    def ends_with_assistant(self) -> bool:
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"

    def add(self, role: str, text: str) -> None:
        """A text of a role; it joins the message before it where that has the same one."""
        if not self.messages or self.messages[-1]["role"] != role:
            self.begin(role)
        if text or self._texts:
            self._texts.append(text)

    def add_thinking(self, text: str) -> None:
        """Reasoning of the assistant's message that is being put together."""
        self.assistant()
        if text:
            self._thinking.append(text)

    def assistant(self) -> dict[str, Any]:
        """The assistant's message that is being put together."""
        return self.messages[-1] if self.ends_with_assistant else self.begin("assistant")

    def begin(self, role: str, **keys: str) -> dict[str, Any]:
        """A new message, without a text yet."""
        self.close()
        self.messages.append({"role": role, **keys, "content": ""})
        return self.messages[-1]

    def close(self) -> None:
        """Complete the last message."""
        if self._texts:
            self.messages[-1]["content"] = "\n".join(self._texts)
        if self._thinking:
            self.messages[-1]["reasoning_content"] = "\n".join(self._thinking)
        self._texts, self._thinking = [], []


def read_conversation(
    messages: list[dict[str, Any]], system: str | list[dict[str, Any]] | None, *, reader: NestedReader
) -> Conversation:
    """Raises InvalidRequestError or UnsupportedFieldError naming `messages[i]`, the block and the key."""
    if not messages:
        raise InvalidRequestError("'messages' must not be empty.", param="messages")
    conversation = Conversation()
    if isinstance(system, str):
        conversation.add("system", system)
    elif system:
        _add_texts(conversation, system, "system", reader=reader)
    for position, message in enumerate(messages):
        path = f"messages[{position}]"
        body = reader.read(message, MessageBody, path=path)
        if isinstance(body.content, str):
            conversation.add(body.role, body.content)
        elif body.role == "system":
            _add_texts(conversation, body.content, f"{path}.content", reader=reader)
        else:
            _add_blocks(conversation, body, f"{path}.content", reader=reader)
    conversation.close()
    last = conversation.messages[-1]
    if last["role"] == "assistant" and last.get("tool_calls"):
        path = f"messages[{len(messages) - 1}].content"
        raise InvalidRequestError(f"'{path}': the tool_use is not followed by a tool_result.", param=path)
    return conversation


def _add_texts(
    conversation: Conversation, blocks: list[dict[str, Any]], path: str, *, reader: NestedReader
) -> None:
    """Blocks of a system prompt."""
    for position, block in enumerate(blocks):
        block_path = f"{path}[{position}]"
        _block_type(block, ("text",), block_path)
        conversation.add("system", _text(block, block_path, reader=reader))


def _add_blocks(conversation: Conversation, body: MessageBody, path: str, *, reader: NestedReader) -> None:
    """Blocks of a user's or an assistant's message."""
    if not body.content:
        raise InvalidRequestError(f"'{path}' has no blocks.", param=path)
    allowed = _USER_BLOCKS if body.role == "user" else _ASSISTANT_BLOCKS
    for position, block in enumerate(body.content):
        assert isinstance(block, dict)
        block_path = f"{path}[{position}]"
        match _block_type(block, allowed, block_path):
            case "text":
                conversation.add(body.role, _text(block, block_path, reader=reader))
            case "tool_result":
                _add_result(conversation, block, block_path, reader=reader)
            case "tool_use":
                _add_call(conversation, reader.read(block, ToolUseBlock, path=block_path), block_path)
            case "thinking":
                conversation.add_thinking(reader.read(block, ThinkingBlock, path=block_path).thinking)
            case _:
                reader.read(block, RedactedThinkingBlock, path=block_path)
                note = "redacted thinking cannot be read by this model; it was left out."
                conversation.warnings.append(RequestWarning(block_path, note))


def _block_type(block: dict[str, Any], allowed: tuple[str, ...], path: str) -> str:
    block_type = block.get("type")
    if not isinstance(block_type, str):
        raise InvalidRequestError(f"'{path}.type' must be one of {', '.join(allowed)}.", param=f"{path}.type")
    if block_type in allowed:
        return block_type
    if block_type in _USER_BLOCKS or block_type in _ASSISTANT_BLOCKS:
        raise InvalidRequestError(
            f"'{path}.type': {block_type!r} is not allowed here, only {', '.join(allowed)}.",
            param=f"{path}.type",
        )
    raise UnsupportedFieldError(
        f"'{path}.type': blocks of type {block_type[:60]!r} are not supported by this server; "
        f"{', '.join(allowed)} are.",
        param=f"{path}.type",
    )


def _text(block: dict[str, Any], path: str, *, reader: NestedReader) -> str:
    checked = reader.read(block, TextBlock, path=path)
    if checked.citations:
        raise UnsupportedFieldError(
            f"'{path}.citations' is not supported by this server.", param=f"{path}.citations"
        )
    return checked.text


def _add_call(conversation: Conversation, block: ToolUseBlock, path: str) -> None:
    if block.caller not in (None, {"type": "direct"}):
        raise UnsupportedFieldError(
            f"'{path}.caller' is not supported by this server.", param=f"{path}.caller"
        )
    _refuse_toolset(block.toolset_name, path)
    conversation.call_names[block.id] = block.name
    conversation.assistant().setdefault("tool_calls", []).append(
        {
            "id": block.id,
            "type": "function",
            "function": {"name": block.name, "arguments": block.input},
        }
    )


def _add_result(
    conversation: Conversation, value: dict[str, Any], path: str, *, reader: NestedReader
) -> None:
    block = reader.read(value, ToolResultBlock, path=path)
    name = conversation.call_names.get(block.tool_use_id)
    if name is None:
        raise InvalidRequestError(
            f"'{path}.tool_use_id': no tool_use before it has the id {block.tool_use_id[:80]!r}.",
            param=f"{path}.tool_use_id",
        )
    _refuse_toolset(block.toolset_name, path)
    text = block.content or ""
    if not isinstance(text, str):
        texts = []
        for position, part in enumerate(text):
            part_path = f"{path}.content[{position}]"
            _block_type(part, ("text",), part_path)
            texts.append(_text(part, part_path, reader=reader))
        text = "\n".join(texts)
    if block.is_error:
        text = f"Error: {text}"  # the only way to tell a model that knows no such mark
    conversation.begin("tool", tool_call_id=block.tool_use_id, name=name)["content"] = text


def _refuse_toolset(toolset_name: str | None, path: str) -> None:
    if toolset_name is not None:
        raise UnsupportedFieldError(
            f"'{path}.toolset_name' is not supported by this server.", param=f"{path}.toolset_name"
        )
