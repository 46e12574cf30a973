"""A server of the routes, on a tokenizer that is made once."""

from __future__ import annotations

import pytest

from graphllm.tokenizer.tokenizer import Tokenizer
from tests.server.dialect_server import DialectServer, write_tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "model")


@pytest.fixture
def dialects(tiny_tokenizer: Tokenizer) -> DialectServer:
    return DialectServer(tiny_tokenizer)
