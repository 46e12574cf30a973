"""The tools of a chat: which may be called, which the model is shown, and how it is told of them.

Owns the checks of names and of the choice, and the words in which tools are described to models whose chat
template knows none: in the system message, with the generic format that such a model's answers are read in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import orjson

from graphllm.errors import InvalidRequestError
from graphllm.tokenizer.chat_template import ChatTemplate

MAX_TOOLS = 512
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
_HOW_TO_CALL = (
    "To call a function, answer with a JSON object of this form and nothing else:\n"
    '{"name": "<name of the function>", "arguments": {<its arguments>}}\n'
    "To call several, write one such object a line. The results come in the next message."
)


class ToolMode(Enum):
    """AUTO: the model decides. NONE: no call. REQUIRED: at least one call of the allowed tools."""

    AUTO = auto()
    NONE = auto()
    REQUIRED = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionTool:
    """A function that the model may call. parameters: a JSON schema of an object; None takes no arguments."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    def for_template(self) -> dict[str, Any]:
        """In the form that chat templates read, which is OpenAI's."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = self.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}

    @property
    def num_chars(self) -> int:
        """About as many as the model is shown."""
        return len(orjson.dumps(self.for_template()["function"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """allowed_names: which tools may be called where that is fewer than all."""

    mode: ToolMode = ToolMode.AUTO
    allowed_names: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class CallableTools:
    """shown: to the model. by_name: those it may call, to the schemas of their arguments."""

    shown: tuple[FunctionTool, ...]
    by_name: Mapping[str, Mapping[str, Any] | None]
    is_required: bool
    is_strict: bool


def callable_tools(tools: Sequence[FunctionTool], choice: ToolChoice) -> CallableTools:
    """What a choice makes of the tools.

    Tools that may not be called are not shown either, so that the model is not tempted; where a call is
    enforced all are, because they explain each other. Raises InvalidRequestError with `param` "tools" or
    "tool_choice".
    """
    _check_names(tools)
    known = {tool.name: tool for tool in tools}
    for name in choice.allowed_names or ():
        if name not in known:
            raise InvalidRequestError(
                f"tool_choice names the tool {name[:64]!r}, which is not among tools.", param="tool_choice"
            )
    if choice.mode is ToolMode.NONE:
        return CallableTools((), {}, is_required=False, is_strict=False)
    allowed = [known[name] for name in dict.fromkeys(choice.allowed_names or known)]
    is_required = choice.mode is ToolMode.REQUIRED
    if is_required and not allowed:
        raise InvalidRequestError("tool_choice requires a call, but there are no tools.", param="tool_choice")
    return CallableTools(
        tuple(tools if is_required else allowed),
        {tool.name: _arguments_schema(tool) for tool in allowed},
        is_required=is_required,
        is_strict=any(tool.strict for tool in allowed),
    )


def distinct_tools(
    bodies: Sequence[dict[str, Any]], read: Callable[[dict[str, Any], str], FunctionTool]
) -> tuple[FunctionTool, ...]:
    """A dialect's tools; read: one body and its path, such as `tools[3]`, to a tool.

    Raises InvalidRequestError for more than are taken, before any is read, and for a name that comes twice.
    """
    _check_num_tools(len(bodies))
    tools: dict[str, FunctionTool] = {}
    for position, body in enumerate(bodies):
        path = f"tools[{position}]"
        tool = read(body, path)
        if tool.name in tools:
            raise InvalidRequestError(
                f"'{path}.name': there are two tools named {tool.name[:80]!r}.", param=f"{path}.name"
            )
        tools[tool.name] = tool
    return tuple(tools.values())


def _check_num_tools(num_tools: int) -> None:
    if num_tools > MAX_TOOLS:
        raise InvalidRequestError(f"'tools' has {num_tools} entries; at most {MAX_TOOLS}.", param="tools")


def _check_names(tools: Sequence[FunctionTool]) -> None:
    _check_num_tools(len(tools))
    seen: set[str] = set()
    for tool in tools:
        if _NAME.fullmatch(tool.name) is None:
            raise InvalidRequestError(
                f"'tools': the name {tool.name[:64]!r} must have 1 to 128 letters, digits or _ - . : /",
                param="tools",
            )
        if tool.name in seen:
            raise InvalidRequestError(f"'tools' has two tools called {tool.name!r}.", param="tools")
        seen.add(tool.name)


def _arguments_schema(tool: FunctionTool) -> Mapping[str, Any] | None:
    """None, for any object, where a schema says nothing about properties."""
    if tool.parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return tool.parameters or None


def with_described_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[FunctionTool], template: ChatTemplate
) -> list[dict[str, Any]]:
    """The messages with the tools described in words: in the system message, or where a template knows no
    such message in front of the first one."""
    lines = [orjson.dumps(tool.for_template()["function"]).decode() for tool in tools]
    words = "\n".join(["You can call these functions:", *lines, _HOW_TO_CALL])
    first, *rest = [dict(message) for message in messages]
    if first["role"] in ("system", "developer"):
        return [{**first, "content": f"{first['content']}\n\n{words}" if first["content"] else words}, *rest]
    if _accepts_system(template):
        return [{"role": "system", "content": words}, first, *rest]
    return [{**first, "content": f"{words}\n\n{first['content']}"}, *rest]


def _accepts_system(template: ChatTemplate) -> bool:
    probe = "graphllm-probe"
    try:
        text = template.render([{"role": "system", "content": probe}, {"role": "user", "content": "?"}])
    except InvalidRequestError:
        return False
    return probe in text
