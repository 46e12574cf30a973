"""Compilers for two small vocabularies, one of each kind, with more logits than tokens."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

import pytest

from graphllm.structured.compiler import GrammarCompiler
from graphllm.structured.limits import GrammarLimits
from graphllm.structured_outputs import StructuredOutputs
from graphllm.tokenizer.tokenizer import Tokenizer
from tests.structured.walks import Walk
from tests.tokenizer.small_tokenizers import tokenizer_of, train_byte_level, train_sentencepiece

NUM_PADDING_ROWS = 37


@dataclass(frozen=True, slots=True)
class Bench:
    """A tokenizer, the compiler for it, and walks under what it compiles."""

    tokenizer: Tokenizer
    compiler: GrammarCompiler
    vocab_size: int
    end_token_ids: frozenset[int]

    @staticmethod
    def of(tokenizer: Tokenizer, ends: Iterable[int], limits: GrammarLimits | None = None) -> Bench:
        vocab_size = tokenizer.vocab_size + NUM_PADDING_ROWS
        end_ids = frozenset(ends)
        compiler = GrammarCompiler(tokenizer, vocab_size=vocab_size, eos_token_ids=end_ids, limits=limits)
        return Bench(tokenizer, compiler, vocab_size, end_ids)

    def walk(self, structured: StructuredOutputs, seed: int = 0) -> Walk:
        constraint = self.compiler.compile(structured)()
        return Walk(constraint, self.tokenizer, self.vocab_size, self.end_token_ids, random.Random(seed))

    def id_of(self, text: str) -> int:
        """The token of exactly this text."""
        return next(i for i in range(self.vocab_size) if self.tokenizer.token_bytes(i) == text.encode())


@pytest.fixture(scope="session")
def byte_level() -> Bench:
    """All bytes, 140 merges, and <s>, </s>, <|im_end|>, of which the last two end a text."""
    tokenizer = tokenizer_of(train_byte_level())
    ends = [i for i in tokenizer.special_token_ids if tokenizer.token_text(i) in ("</s>", "<|im_end|>")]
    return Bench.of(tokenizer, ends)


@pytest.fixture(scope="session")
def sentencepiece() -> Bench:
    """Byte tokens and pieces with blanks in front, as Llama 2 has, ended by </s>."""
    tokenizer = Tokenizer.from_gguf(train_sentencepiece())
    return Bench.of(tokenizer, tokenizer.eos_token_ids)


@pytest.fixture(params=["byte_level", "sentencepiece"])
def bench(request: pytest.FixtureRequest) -> Bench:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Bench)
    return found
