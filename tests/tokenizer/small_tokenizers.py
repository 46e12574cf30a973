"""Small tokenizers trained on the spot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, decoders, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from graphllm.tokenizer.gguf_vocabulary import TokenType
from graphllm.tokenizer.source import TokenizerSource
from graphllm.tokenizer.tokenizer import Tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and then the other fox jumps over the other dog",
    "she said that they were there when the thing they thought about happened again and again",
    "numbers 1 2 3 10 100 1000, names like Ada, Alan, Grace; and some (punctuation)!",
    "été à la plage, où était Zoë? naïve café über straße",
] * 3


def train_byte_level() -> Backend:
    """A byte-level tokenizer with every byte, 140 merges and three special tokens at the end."""
    backend = Backend(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>", "<|im_end|>")])
    return backend


def tokenizer_of(backend: Backend) -> Tokenizer:
    """A Tokenizer that knows nothing but its vocabulary."""
    source = TokenizerSource(
        backend=backend,
        special_tokens={},
        bos_token_id=None,
        eos_token_ids=frozenset(),
        chat_templates={},
    )
    return Tokenizer(source)


def train_sentencepiece() -> Mapping[str, Any]:
    """Metadata as of a Llama 2 GGUF: control, byte and normal tokens, and scores instead of merges."""
    trained = Backend(BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    pieces += ["▁▁", "▁▁▁▁"]  # runs of blanks, as Llama 2 has
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<think>"]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    types += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(pieces) + [TokenType.USER_DEFINED]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [0.0],
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
