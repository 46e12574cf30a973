"""The tokenizer files of a folder in Hugging Face layout.

Owns which files are read and which of them wins: tokenizer.json is the tokenizer (its own
post-processor decides on a beginning-of-text token, as in transformers 5); tokenizer_config.json
and special_tokens_map.json name the special tokens; generation_config.json, or else config.json,
adds end-of-text ids; a template in a file of its own goes before one in tokenizer_config.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from graphllm.errors import CheckpointError
from graphllm.tokenizer.source import TokenizerSource

_MAX_JSON_BYTES = 64 << 20
_MAX_TEMPLATE_BYTES = 1 << 20
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_folder_tokenizer(folder: Path) -> TokenizerSource:
    """Read everything a folder says about its tokenizer. Raises CheckpointError naming the file."""
    backend = _read_backend(folder)
    config = _read_json(folder / "tokenizer_config.json")
    token_map = _read_json(folder / "special_tokens_map.json")
    _add_declared_tokens(backend, config, folder)
    special_tokens = {
        name: text
        for name in _NAMED_TOKENS
        if (text := _token_text(config.get(name)) or _token_text(token_map.get(name))) is not None
    }
    extra = [
        text
        for source in (config, token_map)
        for key in ("additional_special_tokens", "extra_special_tokens")
        for text in _token_list(source.get(key))
    ]
    _mark_special(backend, {*special_tokens.values(), *extra})
    eos_token_id = _named_id(backend, special_tokens.get("eos_token"), f"{folder}: eos_token")
    return TokenizerSource(
        backend=backend,
        special_tokens=special_tokens,
        bos_token_id=_named_id(backend, special_tokens.get("bos_token"), f"{folder}: bos_token"),
        eos_token_ids=frozenset(_configured_eos_ids(folder))
        | (frozenset() if eos_token_id is None else {eos_token_id}),
        chat_templates=_read_chat_templates(folder, config),
        has_types="token_type_ids" in _input_names(config),
        appended_eos_id=eos_token_id if config.get("add_eos_token") is True else None,
    )


def _read_backend(folder: Path) -> Backend:
    path = folder / "tokenizer.json"
    if not path.is_file():
        hint = ""
        if (folder / "tokenizer.model").is_file():
            hint = (
                " (tokenizer.model alone is not enough: load it once with transformers and save_pretrained() "
                "writes tokenizer.json)"
            )
        raise CheckpointError(f"{path}: no such file; it holds the tokenizer{hint}.")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise CheckpointError(f"{path}: not a tokenizer that can be read: {error}") from error
    # Limits that a training script left in the file are not for serving.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} if there is no such file."""
    data = _read_bytes(path, max_bytes=_MAX_JSON_BYTES)
    if data is None:
        return {}
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a JSON file that can be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object.")
    return content


def _read_text(path: Path) -> str | None:
    """A template, or None if there is no such file."""
    data = _read_bytes(path, max_bytes=_MAX_TEMPLATE_BYTES)
    try:
        return None if data is None else data.decode()
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _read_bytes(path: Path, *, max_bytes: int) -> bytes | None:
    """A regular file of bounded size, None if there is none; never waits, as a pipe would make it."""
    if not os.path.lexists(path):
        return None
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: not a regular file.")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if len(data) > max_bytes:
        raise CheckpointError(f"{path}: it is larger than {max_bytes} bytes.")
    return data


def _token_text(value: Any) -> str | None:
    """A token is written as its text, or as an object with the text under "content"."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _token_list(value: Any) -> Iterator[str]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (text for item in values if (text := _token_text(item)) is not None)


def _add_declared_tokens(backend: Backend, config: Mapping[str, Any], folder: Path) -> None:
    """Add tokens that only tokenizer_config.json lists; they must get the ids it gives them."""
    path = folder / "tokenizer_config.json"
    declared = config.get("added_tokens_decoder") or {}
    try:
        by_id = sorted((int(token_id), _token_text(token), token) for token_id, token in declared.items())
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: added_tokens_decoder is not understood: {error}") from error
    for token_id, text, token in by_id:
        if text is None or backend.token_to_id(text) is not None:
            continue
        if not isinstance(token, dict):
            raise CheckpointError(f"{path}: added_tokens_decoder is not understood: {text!r} is no object.")
        special = bool(token.get("special"))
        flags = {name: bool(token.get(name)) for name in ("lstrip", "rstrip", "single_word")}
        normalized = bool(token.get("normalized", not special))
        backend.add_tokens([AddedToken(text, special=special, normalized=normalized, **flags)])
        if backend.token_to_id(text) != token_id:
            raise CheckpointError(
                f"{path}: added_tokens_decoder gives {text!r} the id {token_id}, which does not follow on "
                "the vocabulary of tokenizer.json."
            )


def _mark_special(backend: Backend, texts: set[str]) -> None:
    """A token that a file names as special is special, whatever tokenizer.json calls it."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    backend.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            for text in sorted(texts - special)
            if backend.token_to_id(text) is not None
        ]
    )


def _named_id(backend: Backend, text: str | None, label: str) -> int | None:
    if text is None:
        return None
    token_id = backend.token_to_id(text)
    if token_id is None:
        raise CheckpointError(f"{label} is {text!r}, which is not in the vocabulary of tokenizer.json.")
    return token_id


def _input_names(config: Mapping[str, Any]) -> list[Any]:
    """What transformers' tokenizer of this configuration hands to the model."""
    names = config.get("model_input_names")
    return names if isinstance(names, list) else ["input_ids", "token_type_ids", "attention_mask"]


def _configured_eos_ids(folder: Path) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        value = _read_json(path).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
            raise CheckpointError(
                f"{path}: eos_token_id is {value!r}; it must be a token id or a list of them."
            )
        if any(token_id < 0 for token_id in ids):
            raise CheckpointError(f"{path}: eos_token_id is {value!r}; token ids are not negative.")
        return ids
    return []


def _read_chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    templates = {}
    paths = {"default": folder / "chat_template.jinja"}
    paths |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    for name, path in paths.items():
        if (text := _read_text(path)) is not None:
            templates[name] = text
    if templates:
        return templates
    for path, content in (
        (folder / "tokenizer_config.json", config),
        (folder / "chat_template.json", _read_json(folder / "chat_template.json")),
    ):
        value = content.get("chat_template")
        if isinstance(value, str):
            return {"default": value}
        if isinstance(value, dict):
            value = [{"name": name, "template": template} for name, template in value.items()]
        if value is None:
            continue
        try:
            named = {str(entry["name"]): entry["template"] for entry in value}
        except (TypeError, KeyError) as error:
            raise CheckpointError(
                f"{path}: chat_template is neither a text nor a list of named texts."
            ) from error
        if not all(isinstance(template, str) for template in named.values()):
            raise CheckpointError(f"{path}: chat_template is neither a text nor a list of named texts.")
        return named
    return {}
