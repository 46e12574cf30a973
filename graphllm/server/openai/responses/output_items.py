"""Output items: what a response consists of, while it grows and when it is whole.

Owns their JSON and their order: as they come in a stream; reasoning, text, calls in an answer that is sent
whole. Ids are made here and stay the same through all events.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any
from uuid import uuid4

from graphllm.server.generation.wire import Choice


class ItemKind(Enum):
    REASONING = auto()
    MESSAGE = auto()
    CALL = auto()


_ID_PREFIXES = {ItemKind.REASONING: "rs", ItemKind.MESSAGE: "msg", ItemKind.CALL: "fc"}


@dataclass(slots=True, kw_only=True)
class OutputItem:
    """One item. pieces: its text, or its arguments, so far. logprobs: entries in the API's shape, or None.

    is_summarized: reasoning goes into `summary` instead of `content`.
    """

    kind: ItemKind
    index: int
    call_id: str = ""
    name: str = ""
    is_summarized: bool = False
    pieces: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] | None = None
    item_id: str = ""

    def __post_init__(self) -> None:
        self.item_id = f"{_ID_PREFIXES[self.kind]}_{uuid4().hex}"

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def part(self) -> dict[str, Any]:
        """The item's one content part, or its one summary part, as it stands."""
        if self.kind is ItemKind.REASONING:
            return {"type": "summary_text" if self.is_summarized else "reasoning_text", "text": self.text}
        part: dict[str, Any] = {"type": "output_text", "text": self.text, "annotations": []}
        # The key is there only if asked for: to clients an empty list is "none were".
        if self.logprobs is not None:
            part["logprobs"] = self.logprobs
        return part

    def as_json(self, status: str) -> dict[str, Any]:
        """The item; one that is in progress has no parts yet."""
        parts = [] if status == "in_progress" else [self.part] if self.kind is not ItemKind.CALL else []
        common = {"id": self.item_id, "status": status}
        match self.kind:
            case ItemKind.REASONING:
                if self.is_summarized:
                    return {**common, "type": "reasoning", "summary": parts}
                return {**common, "type": "reasoning", "summary": [], "content": parts}
            case ItemKind.MESSAGE:
                return {**common, "type": "message", "role": "assistant", "content": parts}
            case ItemKind.CALL:
                return {
                    **common,
                    "type": "function_call",
                    "call_id": self.call_id,
                    "name": self.name,
                    "arguments": self.text,
                }


def items_of_choice(
    choice: Choice,
    *,
    logprobs: list[dict[str, Any]] | None,
    is_summarized: bool,
    is_cut: bool,
) -> list[dict[str, Any]]:
    """The items of an answer that was collected whole. is_cut: the last one did not come to its end."""
    items: list[OutputItem] = []
    if choice.reasoning:
        items.append(
            OutputItem(kind=ItemKind.REASONING, index=0, is_summarized=is_summarized, pieces=choice.reasoning)
        )
    if choice.text or (not choice.tool_calls and not is_cut):
        items.append(
            OutputItem(kind=ItemKind.MESSAGE, index=len(items), pieces=choice.text, logprobs=logprobs)
        )
    for call in choice.tool_calls:
        items.append(
            OutputItem(
                kind=ItemKind.CALL,
                index=len(items),
                call_id=call.call_id,
                name=call.name,
                pieces=call.arguments,
            )
        )
    last = len(items) - 1
    return [item.as_json("incomplete" if is_cut and item.index == last else "completed") for item in items]
