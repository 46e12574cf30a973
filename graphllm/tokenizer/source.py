"""What a source of a tokenizer, a folder or a GGUF file, has to say.

Owns only the value; `hf_folder.py` and `gguf_vocabulary.py` fill it, `tokenizer.py` uses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import Tokenizer as Backend


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSource:
    """special_tokens: "bos_token", "eos_token" ... to the token's text, as chat templates see them.

    eos_token_ids: every token that ends a generation. chat_templates: name to Jinja source; a model
    with one template calls it "default", a model without has none. appended_eos_id: the files ask for this
    token behind every text, as those of some embedding models do. has_types: the model is told which of two
    texts a token belongs to.
    """

    backend: Backend
    special_tokens: Mapping[str, str]
    bos_token_id: int | None
    eos_token_ids: frozenset[int]
    chat_templates: Mapping[str, str]
    appended_eos_id: int | None = None
    has_types: bool = True
