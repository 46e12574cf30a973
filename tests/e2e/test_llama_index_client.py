"""LlamaIndex, unmodified and in its own environment, does with this server what it does with OpenAI's."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.e2e.serving import ServerProcess, small_environment

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv" / "llama-index" / "bin" / "python"
COUNTED = "1. 1\n2. 2\n3. 3\n4. 4\n5. 5\n6. 6\n7."


def test_a_session_of_chats_tools_structured_output_and_embeddings(server: ServerProcess) -> None:
    assert PYTHON.exists(), "make .venv/llama-index/.installed makes LlamaIndex's environment"
    session = subprocess.run(
        [PYTHON, ROOT / "tests" / "e2e" / "llama_index_session.py", server.url],
        env=small_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert session.returncode == 0, session.stderr
    results = json.loads(session.stdout)
    assert results["chat"] == results["async"] == "".join(results["stream"]) == COUNTED
    assert len(results["stream"]) > 16
    (call,) = results["calls"]
    assert call["name"] == "add"
    assert {name: type(value) for name, value in call["arguments"].items()} == {"a": int, "b": int}
    assert {name: type(value) for name, value in results["structured"].items()} == {
        "name": str,
        "is_capital": bool,
    }
    assert results["completion"].startswith(" 5")
    assert sum(value * value for value in results["embedding"]) == pytest.approx(1.0, abs=1e-3)
