"""Text to token ids and back, for one model.

Owns the `Tokenizer` that everything above this floor uses. The `tokenizers` library does the
encoding; decoding is a table lookup (`token_bytes.py`). Streaming is in `detokenizer.py`, chat
templates in `chat_template.py`, the files a tokenizer comes from in `hf_folder.py` and
`gguf_vocabulary.py`.

Special tokens in a user's text are special here too: `encode("<|im_end|>")` is one token, in raw
prompts and in the messages of a chat alike, as in transformers.

Encoding runs on the caller's thread and blocks it. Measured with the demo model's vocabulary on one
core of a small box: 0.45 ms for 1,000 characters of English, 16 ms for a prompt of 7,000 tokens, 1.3 s
for 1 MB. Callers on an event loop pass `max_tokens`, which bounds the work by the context: with 8,192
tokens a text that is too long is refused after 3 ms (20 MB) to 130 ms (600 KB of digits). Only text
of very long tokens, such as blanks, comes near `max_tokens * longest_token_bytes` bytes before that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import orjson
from tokenizers import Tokenizer as Backend

from graphllm.errors import CheckpointError, ContextLengthError, InvalidRequestError
from graphllm.tokenizer.chat_template import ChatTemplate
from graphllm.tokenizer.gguf_vocabulary import read_gguf_tokenizer
from graphllm.tokenizer.hf_folder import read_folder_tokenizer
from graphllm.tokenizer.source import TokenizerSource
from graphllm.tokenizer.token_bytes import TokenBytes, read_decoder_rules

# A text with more characters than this for each allowed token is probed before it is encoded whole:
# few real prompts are, English has four to five.
_PROBE_CHARS_PER_TOKEN = 8
# Cutting a text changes its tokens near the cut only, so a prefix with half as many tokens again as
# are allowed, and those of one word cut into bytes, proves that the whole has too many.
_PROBE_MARGIN = 1.5
# Tokens near the place where a text is cut that may be others than in the whole.
_CUT_MARGIN = 64


class Tokenizer:
    """One model's tokenizer; immutable after construction.

    vocab_size: one more than the largest token id; the model's own may be larger (padding rows).
    eos_token_ids: tokens that end a generation. special_token_ids: tokens that are no text.
    added_tokens: ids of the tokens beside the vocabulary proper, special or not, by their text.
    appended_eos_id: the token that tokenizer_config.json wants behind every text (`add_eos_token`), for texts
    that are to be embedded: `encode` does not append it.
    """

    __slots__ = (
        "_backend",
        "_has_types",
        "_token_bytes",
        "added_tokens",
        "appended_eos_id",
        "bos_token_id",
        "chat_template",
        "eos_token_ids",
        "longest_token_bytes",
        "special_token_ids",
        "vocab_size",
    )

    def __init__(self, source: TokenizerSource) -> None:
        """Raises CheckpointError for a decoder or a chat template that is not supported."""
        backend = source.backend
        spellings = _spellings(backend)
        self._backend = backend
        self.vocab_size: int = max(spellings, default=-1) + 1
        self.bos_token_id: int | None = source.bos_token_id
        self.eos_token_ids: frozenset[int] = source.eos_token_ids
        self.appended_eos_id = source.appended_eos_id
        self._has_types = source.has_types
        added = backend.get_added_tokens_decoder()
        self.added_tokens: Mapping[str, int] = {token.content: token_id for token_id, token in added.items()}
        self.special_token_ids: frozenset[int] = frozenset(
            token_id for token_id, token in added.items() if token.special
        )
        self.chat_template: ChatTemplate | None = (
            ChatTemplate(source.chat_templates, source.special_tokens) if source.chat_templates else None
        )
        decoder = None if backend.decoder is None else orjson.loads(backend.decoder.__getstate__())
        self._token_bytes = TokenBytes(
            spellings, rules=read_decoder_rules(decoder), special_token_ids=self.special_token_ids
        )
        self.longest_token_bytes: int = max(map(len, self._token_bytes.all.values()), default=1)

    @classmethod
    def from_folder(cls, path: Path) -> Tokenizer:
        """Read a folder in Hugging Face layout. Raises CheckpointError naming the file."""
        source = read_folder_tokenizer(path)
        try:
            return cls(source)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error.message}") from error

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> Tokenizer:
        """Build from a GGUF file's metadata: plain Python values by their GGUF names.

        Raises CheckpointError naming the field.
        """
        return cls(read_gguf_tokenizer(fields))

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
        param: str = "prompt",
    ) -> list[int]:
        """Token ids of a text; `add_special_tokens` puts what the model wants around it (BOS).

        max_tokens: raise ContextLengthError above it, without encoding a text that is far too long.
        A text that cannot fit by its bytes is refused even where the tokenizer would have dropped
        most of them (blanks beside some special tokens).
        param: the request field that errors name.
        Characters that the vocabulary has no bytes for vanish, as in the library (the demo model has
        none for some control characters), so the ids of a text may be none.
        Raises InvalidRequestError for lone surrogates, which are no text.
        """
        num_bytes = len(_utf8(text, param=param))
        if max_tokens is not None:
            self._probe_length(text, num_bytes, max_tokens=max_tokens, param=param)
        token_ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        if max_tokens is not None and len(token_ids) > max_tokens:
            _refuse_length(str(len(token_ids)), max_tokens, param=param)
        return token_ids

    def encode_cut(
        self, text: str, *, max_tokens: int, keeps_first: bool, add_special_tokens: bool, param: str
    ) -> list[int]:
        """Token ids of a text, at most so many: it loses its end, or its beginning, never what is around it.

        The work is bounded by `max_tokens`: a text that is far longer is cut beyond them before it is
        tokenized, which changes tokens near that cut only. Raises InvalidRequestError for what is no text.
        """
        _utf8(text, param=param)
        num_special = self._backend.num_special_tokens_to_add(False) if add_special_tokens else 0
        num_kept = max(0, max_tokens - num_special)
        num_chars = _PROBE_CHARS_PER_TOKEN * (num_kept + _CUT_MARGIN)
        while True:
            is_whole = num_chars >= len(text)
            part = text if is_whole else text[:num_chars] if keeps_first else text[-num_chars:]
            encoding = self._backend.encode(part, add_special_tokens=False)
            if is_whole or len(encoding) >= num_kept + _CUT_MARGIN:
                break
            num_chars *= 4
        encoding.truncate(num_kept, direction="right" if keeps_first else "left")
        ids: list[int] = self._backend.post_process(encoding, None, add_special_tokens).ids
        return ids

    def encode_pair(
        self, first: str, second: str, *, max_tokens: int, is_cut: bool, params: tuple[str, str]
    ) -> tuple[list[int], list[int]]:
        """Ids and types of two texts in one, with what the tokenizer puts around and between them.

        A type is 0 or 1, of the second text where the tokenizer tells them apart. is_cut: what is more than
        max_tokens is taken off the ends, of the longer text first; otherwise ContextLengthError is raised.
        params: the request's fields, for errors; the longer text is at fault. Raises InvalidRequestError for
        what is no text.
        """
        texts = []
        for text, param in zip((first, second), params, strict=True):
            num_bytes = len(_utf8(text, param=param))
            if is_cut:
                text = text[: max_tokens * self.longest_token_bytes]
            else:
                self._probe_length(text, num_bytes, max_tokens=max_tokens, param=param)
            texts.append(self._backend.encode(text, add_special_tokens=False))
        num_special = self._backend.num_special_tokens_to_add(True)
        num_tokens = sum(map(len, texts)) + num_special
        if num_tokens > max_tokens and not is_cut:
            _refuse_length(str(num_tokens), max_tokens, param=params[len(texts[0]) <= len(texts[1])])
        lengths = _longest_first(len(texts[0]), len(texts[1]), max(0, max_tokens - num_special))
        for encoding, length in zip(texts, lengths, strict=True):
            encoding.truncate(length)
        encoding = self._backend.post_process(texts[0], texts[1], True)
        return encoding.ids, encoding.type_ids if self._has_types else [0] * len(encoding)

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; bytes that are not UTF-8 become U+FFFD.

        Ids outside the vocabulary have no text. A SentencePiece-like tokenizer drops the space that
        opens the text, so the text of a continuation is `IncrementalDetokenizer`'s to find.
        """
        return self._token_bytes.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The token's bytes within a text; a special token's are its spelling."""
        return self._token_bytes.all[token_id]

    def token_text(self, token_id: int) -> str:
        """The token's bytes as text, U+FFFD for what is no whole character by itself."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    @property
    def byte_tables(self) -> TokenBytes:
        """The bytes of all tokens, for decoders of many."""
        return self._token_bytes

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        max_tokens: int | None = None,
        **template_kwargs: Any,
    ) -> str:
        """The chat as the text that the model continues, special tokens spelt out.

        Raises InvalidRequestError when the model has no template or the template refuses the
        messages, ContextLengthError for more text than `max_tokens` tokens can hold.
        """
        if self.chat_template is None:
            raise InvalidRequestError(
                "This model has no chat template; use /v1/completions.", param="messages"
            )
        return self.chat_template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            template_kwargs=template_kwargs,
            max_chars=None if max_tokens is None else max_tokens * self.longest_token_bytes,
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        max_tokens: int | None = None,
        **template_kwargs: Any,
    ) -> list[int]:
        """Token ids of a rendered chat. No special tokens are added: the template has written them."""
        text = self.render_chat(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            max_tokens=max_tokens,
            **template_kwargs,
        )
        return self.encode(text, add_special_tokens=False, max_tokens=max_tokens, param="messages")

    def _probe_length(self, text: str, num_bytes: int, *, max_tokens: int, param: str) -> None:
        """Raise ContextLengthError for a text that is far too long, at a cost bounded by `max_tokens`."""
        if num_bytes > max_tokens * self.longest_token_bytes:
            _refuse_length(f"at least {num_bytes // self.longest_token_bytes}", max_tokens, param=param)
        num_chars = max(1, _PROBE_CHARS_PER_TOKEN * max_tokens)
        while num_chars < len(text):
            num_tokens = len(self._backend.encode(text[:num_chars], add_special_tokens=False).ids)
            if num_tokens > _PROBE_MARGIN * max_tokens + self.longest_token_bytes:
                _refuse_length(f"more than {max_tokens}", max_tokens, param=param)
            num_chars *= 4


def _spellings(backend: Backend) -> dict[int, str]:
    """Token id to the vocabulary's spelling, added tokens included."""
    spellings = {token_id: token for token, token_id in backend.get_vocab().items()}
    # Two ids may share one text; the vocabulary then lists the text once.
    for token_id in range(max(spellings, default=-1)):
        if token_id not in spellings and (token := backend.id_to_token(token_id)) is not None:
            spellings[token_id] = token
    return spellings


def _utf8(text: str, *, param: str) -> bytes:
    """Raises InvalidRequestError for lone surrogates, which are no text."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"The text has a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}; "
            "it is not valid Unicode.",
            param=param,
        ) from error


def _longest_first(first: int, second: int, max_tokens: int) -> tuple[int, int]:
    """Two lengths, the larger one lowered to the other and then both in turn, to so many in all.

    As the library cuts pairs ("longest_first"): what does not divide by two goes to the longer.
    """
    if first + second <= max_tokens:
        return first, second
    shorter = min(first, second)
    longer = max(shorter, max_tokens - shorter)
    if shorter + longer > max_tokens:
        shorter, longer = max_tokens // 2, max_tokens - max_tokens // 2
    return (longer, shorter) if first > second else (shorter, longer)


def _refuse_length(num_tokens: str, max_tokens: int, *, param: str) -> NoReturn:
    raise ContextLengthError(
        f"The model's context is {max_tokens} tokens, but the prompt has {num_tokens} tokens.", param=param
    )
