"""A tokenizer without a file, for models of random weights: it fills a vocabulary of any size.

Owns the vocabulary, which is chosen so that a random model's output is text and prompts are easy to
make: ids 0 to 255 are the bytes, three special tokens follow, and every id after those is a space and a
few letters (" abcd"). Every text is encoded and decoded without loss. Ids of letters come back as the
same ids where no letter follows them, so a prompt of n such ids has n tokens, as text too.
"""

from __future__ import annotations

import itertools
import string

from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from graphllm.errors import CheckpointError
from graphllm.tokenizer.source import TokenizerSource
from graphllm.tokenizer.token_bytes import byte_level_alphabet
from graphllm.tokenizer.tokenizer import Tokenizer

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, START_OF_TURN, END_OF_TURN)
FIRST_WORD_ID = 256 + len(SPECIAL_TOKENS)
"""The first id that is a space and letters."""

# OpenAI's ChatML, as most small chat models have it.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_level_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` tokens; generation ends with <|endoftext|> and <|im_end|>.

    Takes half a second at 150,000 tokens. Raises CheckpointError below FIRST_WORD_ID tokens.
    """
    if vocab_size < FIRST_WORD_ID:
        raise CheckpointError(
            f"A vocabulary of {vocab_size} tokens is too small for a byte-level tokenizer, which needs at "
            f"least {FIRST_WORD_ID}."
        )
    # A word that is in the vocabulary is one token though no merges lead to it; any other is its bytes.
    backend = Backend(BPE(vocab=_vocabulary(vocab_size), merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    source = TokenizerSource(
        backend=backend,
        special_tokens={"eos_token": END_OF_TEXT},
        bos_token_id=None,
        eos_token_ids=frozenset(256 + SPECIAL_TOKENS.index(text) for text in (END_OF_TEXT, END_OF_TURN)),
        chat_templates={"default": _CHAT_TEMPLATE},
    )
    return Tokenizer(source)


def _vocabulary(vocab_size: int) -> dict[str, int]:
    """Spelling to id, in the alphabet of byte-level tokenizers."""
    alphabet = byte_level_alphabet()
    num_words = vocab_size - FIRST_WORD_ID
    # All of one length, so that none begins another.
    length = 1
    while len(string.ascii_lowercase) ** length < num_words:
        length += 1
    letters = itertools.product(string.ascii_lowercase, repeat=length)
    words = (alphabet[ord(" ")] + "".join(word) for word in itertools.islice(letters, num_words))
    spellings = (*(alphabet[byte] for byte in range(256)), *SPECIAL_TOKENS, *words)
    return {spelling: token_id for token_id, spelling in enumerate(spellings)}
