"""Fields of the Responses API that this server does not honour. Owns the table; `decoding.py` applies it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from graphllm.server.generation.fields import KnownField

RESPONSES_FIELDS: Final[Mapping[str, KnownField]] = {
    # OpenAI's
    "access_programs": KnownField(note="Access programs are OpenAI's own.", neutral=({},)),
    "background_options": KnownField(
        note="A background response runs as soon as it can.",
        neutral=({}, {"completion_window": "soonest"}),
        is_tolerated=True,
    ),
    "context_management": KnownField(note="Conversations are not compacted.", neutral=([],)),
    "conversation": KnownField(note="Conversations are continued by previous_response_id."),
    "image": KnownField(note="Images are not read.", neutral=({},)),
    "max_tool_calls": KnownField(
        note="It bounds calls of built-in tools, of which this server has none.", is_tolerated=True
    ),
    "moderation": KnownField(note="Nothing is moderated here."),
    "prompt": KnownField(note="No prompts are stored here: send the text as input or instructions."),
    "prompt_cache_options": KnownField(
        note="Prefixes are cached automatically, for as long as there is room.",
        neutral=({}, {"mode": "implicit"}),
        is_tolerated=True,
    ),
    "prompt_cache_retention": KnownField(
        note="Cached prefixes stay as long as there is room.", neutral=("in_memory",), is_tolerated=True
    ),
    "service_tier": KnownField(
        note="There is one service tier; see priority.", neutral=("auto", "default"), is_tolerated=True
    ),
    # vLLM's
    "enable_response_messages": KnownField(note="Raw messages are not returned.", neutral=(False,)),
    "kv_transfer_params": KnownField(note="KV is not transferred between servers.", neutral=({},)),
    "mm_processor_kwargs": KnownField(note="Only text is read.", neutral=({},)),
    "previous_input_messages": KnownField(note="Send earlier turns as input items.", neutral=([],)),
    "previous_response": KnownField(note="Send earlier turns as input items, or previous_response_id."),
    "request_id": KnownField(note="Ids are made by the server."),
    "vllm_xargs": KnownField(note="There are no extensions to pass it to.", neutral=({},)),
}
