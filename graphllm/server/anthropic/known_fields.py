"""Fields of Anthropic's API that this server does not honour. Owns the table; `decoding.py` applies it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from graphllm.server.generation.fields import KnownField

COUNT_FIELDS: Final[Mapping[str, KnownField]] = {
    "context_management": KnownField(note="Conversations are not edited.", neutral=({}, {"edits": []})),
    "mcp_servers": KnownField(note="No tools are run here.", neutral=([],)),
    "speed": KnownField(note="There is one speed.", neutral=("standard",), is_tolerated=True),
    "user_profile_id": KnownField(note="There are no user profiles.", is_tolerated=True),
    "workspace_id": KnownField(note="There are no workspaces.", is_tolerated=True),
}

MESSAGES_FIELDS: Final[Mapping[str, KnownField]] = {
    **COUNT_FIELDS,
    "container": KnownField(note="No code is run here."),
    "diagnostics": KnownField(note="Usage says how much of the prompt was cached.", is_tolerated=True),
    "inference_geo": KnownField(note="The model runs where this server is.", is_tolerated=True),
    "service_tier": KnownField(
        note="There is one service tier; see priority.", neutral=("auto", "standard_only"), is_tolerated=True
    ),
}
