"""Writes the golden answers anew."""

from __future__ import annotations

from tests.server.openai.golden import CASES, answer, path_of

for name in CASES:
    path_of(name).write_bytes(answer(name))
