"""One server with the demo model for a worker's whole session, and the OpenAI client for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.serving import ServerProcess, running_server
from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The demo model, in float32, whose tokens the facts know."""
    folder = tmp_path_factory.mktemp("demo-server")
    arguments = ("--dtype", "float32", "--max-num-seqs", "32", "--kv-cache-memory-bytes", "500MB")
    with running_server(folder, *arguments) as server:
        yield server


@pytest.fixture
def server(demo_server: ServerProcess) -> Iterator[ServerProcess]:
    """The session's server; whatever a test did to it, it holds nothing afterwards."""
    yield demo_server
    demo_server.wait_until_idle()
    assert demo_server.get("/health").status == 200


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Loads at once and talks nonsense for as long as it is asked to."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model", context=8192)
