"""Tools and the choice among them as OpenAI's API writes them, the older `functions` included.

Owns the structs and their translation. What the model is shown of the tools is `generation/tools.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from graphllm.errors import InvalidRequestError, UnsupportedFieldError
from graphllm.server.generation.tools import FunctionTool, ToolChoice, ToolMode

_MODES = {"auto": ToolMode.AUTO, "none": ToolMode.NONE, "required": ToolMode.REQUIRED}


class FunctionDefinition(msgspec.Struct, forbid_unknown_fields=True):
    """parameters: a JSON schema of an object; without one the function takes no arguments."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    """type: "function"; others are refused."""

    type: str
    function: FunctionDefinition | None = None
    custom: Any = None


class FunctionName(msgspec.Struct, forbid_unknown_fields=True):
    """A function by its name."""

    name: str


class ToolReference(msgspec.Struct, forbid_unknown_fields=True):
    """A tool by its function's name."""

    type: str
    function: FunctionName


class AllowedTools(msgspec.Struct, forbid_unknown_fields=True):
    """mode: "auto" or "required"."""

    mode: str
    tools: list[ToolReference]


class ToolChoiceObject(msgspec.Struct, forbid_unknown_fields=True):
    """type: "function" with a function, or "allowed_tools" with allowed_tools."""

    type: str
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None
    custom: Any = None


def function_tools(tools: Sequence[Tool]) -> tuple[FunctionTool, ...]:
    """Raises UnsupportedFieldError or InvalidRequestError naming `tools[i]`."""
    found = []
    for position, tool in enumerate(tools):
        path = f"tools[{position}]"
        if tool.type != "function" or tool.custom is not None:
            raise UnsupportedFieldError(
                f"'{path}.type' must be 'function', not {tool.type[:40]!r}.", param=f"{path}.type"
            )
        if tool.function is None:
            raise InvalidRequestError(f"Missing required field: '{path}.function'.", param=f"{path}.function")
        found.append(_function_tool(tool.function))
    return tuple(found)


def tools_of_functions(functions: Sequence[FunctionDefinition]) -> tuple[FunctionTool, ...]:
    """The older way to write tools."""
    return tuple(_function_tool(function) for function in functions)


def tool_choice(choice: str | ToolChoiceObject | None) -> ToolChoice:
    """Raises InvalidRequestError or UnsupportedFieldError naming `tool_choice`."""
    if choice is None:
        return ToolChoice()
    if isinstance(choice, str):
        if choice not in _MODES:
            raise InvalidRequestError(
                f"'tool_choice' must be {', '.join(_MODES)} or an object that names a function, "
                f"not {choice[:40]!r}.",
                param="tool_choice",
            )
        return ToolChoice(mode=_MODES[choice])
    if choice.type == "function" and choice.function is not None:
        return ToolChoice(mode=ToolMode.REQUIRED, allowed_names=(choice.function.name,))
    if choice.type == "allowed_tools" and choice.allowed_tools is not None:
        allowed = choice.allowed_tools
        if allowed.mode not in ("auto", "required"):
            raise InvalidRequestError(
                f"'tool_choice.allowed_tools.mode' must be auto or required, not {allowed.mode[:40]!r}.",
                param="tool_choice.allowed_tools.mode",
            )
        names = tuple(tool.function.name for tool in allowed.tools)
        if not names:
            raise InvalidRequestError(
                "'tool_choice.allowed_tools.tools' must not be empty.",
                param="tool_choice.allowed_tools.tools",
            )
        return ToolChoice(mode=_MODES[allowed.mode], allowed_names=names)
    raise UnsupportedFieldError(
        "'tool_choice' must have type 'function' with 'function', or 'allowed_tools' with 'allowed_tools'; "
        f"not type {choice.type[:40]!r}.",
        param="tool_choice",
    )


def function_choice(choice: str | FunctionName | None) -> ToolChoice:
    """The older `function_call`. Raises InvalidRequestError."""
    if isinstance(choice, FunctionName):
        return ToolChoice(mode=ToolMode.REQUIRED, allowed_names=(choice.name,))
    if choice not in (None, "auto", "none"):
        raise InvalidRequestError(
            f"'function_call' must be auto, none or an object with a name, not {choice[:40]!r}.",
            param="function_call",
        )
    return ToolChoice(mode=_MODES[choice or "auto"])


def _function_tool(function: FunctionDefinition) -> FunctionTool:
    return FunctionTool(
        name=function.name,
        description=function.description,
        parameters=function.parameters,
        strict=bool(function.strict),
    )
