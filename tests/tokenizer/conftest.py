"""Tokenizers to test with: the demo model's, and a small SentencePiece one trained on the spot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from graphllm.models.demo import demo_model_path
from graphllm.models.gguf_file import GGUFFile
from graphllm.tokenizer.gguf_vocabulary import read_gguf_tokenizer
from graphllm.tokenizer.tokenizer import Tokenizer
from tests.tokenizer.small_tokenizers import tokenizer_of, train_byte_level, train_sentencepiece


@pytest.fixture(scope="session")
def demo_fields() -> Mapping[str, Any]:
    """The demo model's metadata: byte-level BPE, 49,152 tokens, pre-tokenizer 'smollm'."""
    return GGUFFile(demo_model_path()).fields


@pytest.fixture(scope="session")
def demo(demo_fields: Mapping[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(demo_fields)


@pytest.fixture(scope="session")
def demo_backend(demo_fields: Mapping[str, Any]) -> Backend:
    """The library's own tokenizer behind `demo`, as the reference for decoding."""
    return read_gguf_tokenizer(demo_fields).backend


@pytest.fixture(scope="session")
def sentencepiece_fields() -> Mapping[str, Any]:
    return train_sentencepiece()


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_fields: Mapping[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(sentencepiece_fields)


@pytest.fixture(scope="session")
def sentencepiece_backend(sentencepiece_fields: Mapping[str, Any]) -> Backend:
    return read_gguf_tokenizer(sentencepiece_fields).backend


@pytest.fixture
def small_backend() -> Backend:
    """A byte-level tokenizer of a few hundred tokens, as a folder's tokenizer.json would hold."""
    return train_byte_level()


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    """The same as a Tokenizer; unlike the demo model's it has a token for every byte."""
    return tokenizer_of(train_byte_level())
