"""What a folder says of its embeddings in the files of sentence-transformers.

Owns reading and checking modules.json, the pooling's and dense layers' configurations, the longest text and
the prompts. Opens no weights. What is honoured: one Transformer in the folder itself, one Pooling by the
first or last token, the mean, the sum by the root of the length or the maximum, any number of Dense layers
with identity or tanh, and a Normalize at the end. Everything else is refused by name: a vector that is nearly
what was published is of no use. Formats:
https://sbert.net/docs/package_reference/sentence_transformer/models.html
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from graphllm.errors import CheckpointError
from graphllm.models.family import PoolingMethod

MODULES_FILE = "modules.json"
SETTINGS_FILE = "config_sentence_transformers.json"
# The second name for each kind of encoder is what early versions wrote.
LENGTH_FILES = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
_MAX_JSON_BYTES = 16 << 20
_PACKAGE = "sentence_transformers."
_METHOD_OF_FLAG: Mapping[str, PoolingMethod] = {
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt",
    "pooling_mode_lasttoken": "last",
}
_METHOD_OF_MODE: Mapping[str, PoolingMethod] = {
    "cls": "first",
    "mean": "mean",
    "max": "max",
    "mean_sqrt_len_tokens": "mean_sqrt",
    "lasttoken": "last",
}
_HAS_TANH = {
    "torch.nn.modules.linear.Identity": False,
    "torch.nn.modules.activation.Tanh": True,
}
_PLAIN_STATES = {"method": "forward", "method_output_name": "last_hidden_state"}
_NO_LENGTH = 10**9
_SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """A linear layer behind pooling. folder: that holds its weights, within the model's."""

    folder: str
    in_features: int
    out_features: int
    has_bias: bool
    has_tanh: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SentenceTransformer:
    """What modules.json and the files that it names say.

    width: how many numbers the pooling file says that a token's state has, None where it says nothing.
    max_tokens: the longest text with its special tokens, None where the model alone decides. prompts: texts
    that are put in front of a text, by their names; default_prompt: the name of the one that is used where
    none is asked for. similarity: how the makers compare vectors.
    """

    method: PoolingMethod
    width: int | None = None
    dense: tuple[DenseLayer, ...] = ()
    normalizes: bool = False
    max_tokens: int | None = None
    lowercases: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    similarity: str = "cosine"


def has_sentence_transformer(path: Path) -> bool:
    """Whether a model's folder was published with a description of its embeddings."""
    return (path / MODULES_FILE).is_file()


def read_sentence_transformer(path: Path) -> SentenceTransformer:
    """Read a folder that has modules.json. Raises CheckpointError naming the file and what is wrong."""
    modules = _read_modules(path)
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or "Normalize" in kinds[2:-1]:
        _refuse(
            path / MODULES_FILE,
            f"has the modules {', '.join(kinds)}; what is supported is Transformer, Pooling, any number of "
            "Dense and, at the end, Normalize",
        )
    for kind, folder in modules[2:]:
        if kind not in ("Dense", "Normalize"):
            _refuse(path / MODULES_FILE, f"has the module {kind} in {folder!r}, which is not supported")
    if modules[0][1]:
        _refuse(
            path / MODULES_FILE, f"keeps the model in {modules[0][1]!r}; give that folder to serve it alone"
        )
    max_tokens, lowercases = _read_length(path)
    settings = _Object.read(path / SETTINGS_FILE)
    prompts = _read_prompts(settings)
    pooling = _Object.read(path / modules[1][1] / "config.json", is_needed=True)
    return SentenceTransformer(
        method=_read_method(pooling),
        width=(
            pooling.optional_size("word_embedding_dimension") or pooling.optional_size("embedding_dimension")
        ),
        dense=tuple(_read_dense(path, folder) for kind, folder in modules[2:] if kind == "Dense"),
        normalizes=kinds[-1] == "Normalize",
        max_tokens=max_tokens,
        lowercases=lowercases,
        prompts=prompts,
        default_prompt=_read_default_prompt(settings, prompts),
        similarity=_read_similarity(settings),
    )


def read_cross_encoder_activation(path: Path) -> str | None:
    """The class that makes scores of a cross-encoder's logits, where sentence-transformers has noted it."""
    settings = _Object.read(path / SETTINGS_FILE) if path.is_dir() else _Object(path, {})
    name = settings.values.get("activation_fn")
    return name if isinstance(name, str) else None


class _Object:
    """A JSON object of one file; what nobody reads is refused."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values

    @classmethod
    def read(cls, path: Path, *, is_needed: bool = False) -> _Object:
        values = _read_json(path, is_needed=is_needed)
        if values is None:
            values = {}
        if not isinstance(values, dict):
            _refuse(path, "is not a JSON object")
        return cls(path, values)

    def check_keys(self, known: frozenset[str]) -> None:
        for key, value in self.values.items():
            if key not in known and value not in (None, False):
                _refuse(self.path, f"key {key!r} ({value!r:.60}) is not understood")

    def expect(self, key: str, value: object) -> None:
        """Refuse any value of the key but this one; absent is as good."""
        found = self.values.get(key)
        if found is not None and found != value:
            _refuse(self.path, f"key {key!r} is {found!r:.80}; only {value!r:.80} is supported")

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            _refuse(self.path, f"key {key!r} is {value!r:.60}, not true or false")
        return value

    def optional_size(self, key: str) -> int | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            _refuse(self.path, f"key {key!r} is {value!r:.60}, not a positive integer")
        return value

    def size(self, key: str) -> int:
        value = self.optional_size(key)
        if value is None:
            _refuse(self.path, f"key {key!r} is missing")
        return value

    def choice(self, key: str, choices: Mapping[str, Any], default: str) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, str) or value not in choices:
            _refuse(self.path, f"key {key!r} is {value!r:.60}; supported are {', '.join(choices)}")
        return choices[value]


def _read_modules(path: Path) -> list[tuple[str, str]]:
    """Kind and folder of each module, in their order."""
    file = path / MODULES_FILE
    entries = _read_json(file, is_needed=True)
    if not isinstance(entries, list) or not entries:
        _refuse(file, "is not a list of modules")
    modules = []
    for entry in entries:
        match entry:
            case {"path": str(folder), "type": str(kind)}:
                pass
            case _:
                _refuse(file, f"entry {entry!r:.80} has no 'path' and 'type'")
        if not kind.startswith(_PACKAGE):
            _refuse(file, f"asks for the module {kind!r}, which is code of its own and is not run")
        if Path(folder).is_absolute() or ".." in Path(folder).parts:
            _refuse(file, f"names the folder {folder!r}, which lies outside")
        modules.append((kind.rpartition(".")[2], folder))
    return modules


def _read_method(config: _Object) -> PoolingMethod:
    flags = {key for key in config.values if key.startswith("pooling_mode_")}
    config.check_keys(
        frozenset({"word_embedding_dimension", "embedding_dimension", "include_prompt", "pooling_mode"})
        | _METHOD_OF_FLAG.keys()
    )
    if not config.flag("include_prompt", True):
        _refuse(
            config.path, "key 'include_prompt' is false: leaving prompts out of the mean is not supported"
        )
    mode = config.values.get("pooling_mode")
    if mode is not None:
        found: PoolingMethod = config.choice("pooling_mode", _METHOD_OF_MODE, "mean")
        return found
    if not flags:
        return "mean"  # what the library does
    asked = [flag for flag in _METHOD_OF_FLAG if config.flag(flag, False)]
    if len(asked) != 1:
        _refuse(
            config.path,
            f"asks for {' and '.join(asked) if asked else 'no pooling'}; exactly one way is supported",
        )
    return _METHOD_OF_FLAG[asked[0]]


def _read_dense(path: Path, folder: str) -> DenseLayer:
    config = _Object.read(path / folder / "config.json", is_needed=True)
    config.expect("module_input_name", "sentence_embedding")
    config.expect("module_output_name", "sentence_embedding")
    config.check_keys(
        frozenset(
            {
                "in_features",
                "out_features",
                "bias",
                "activation_function",
                "module_input_name",
                "module_output_name",
            }
        )
    )
    return DenseLayer(
        folder,
        config.size("in_features"),
        config.size("out_features"),
        config.flag("bias", True),
        config.choice("activation_function", _HAS_TANH, "torch.nn.modules.activation.Tanh"),
    )


def _read_length(path: Path) -> tuple[int | None, bool]:
    """The longest text, and whether texts are lowercased before they are tokenized.

    Where the file has no length, as since version 6 of the library, it is the tokenizer's.
    """
    length, lowercases = None, False
    for name in LENGTH_FILES:
        if os.path.lexists(path / name):
            config = _Object.read(path / name)
            config.expect("transformer_task", "feature-extraction")
            config.expect("modality_config", {"text": _PLAIN_STATES})
            config.expect("module_output_name", "token_embeddings")
            length, lowercases = config.optional_size("max_seq_length"), config.flag("do_lower_case", False)
            break
    if length is None:
        of_tokenizer = _Object.read(path / "tokenizer_config.json").values.get("model_max_length")
        # A tokenizer without a limit says 1e30.
        if type(of_tokenizer) is int and 0 < of_tokenizer < _NO_LENGTH:
            length = of_tokenizer
    return length, lowercases


def _read_prompts(settings: _Object) -> dict[str, str]:
    settings.check_keys(
        frozenset({"__version__", "prompts", "default_prompt_name", "similarity_fn_name", "model_type"})
    )
    kind = settings.values.get("model_type")
    if kind not in (None, "SentenceTransformer"):
        _refuse(settings.path, f"key 'model_type' is {kind!r:.60}, which is not supported")
    prompts = settings.values.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        _refuse(settings.path, "key 'prompts' is no object of texts")
    return prompts


def _read_default_prompt(settings: _Object, prompts: Mapping[str, str]) -> str | None:
    name = settings.values.get("default_prompt_name")
    if name is None:
        return None
    if not isinstance(name, str) or name not in prompts:
        _refuse(settings.path, f"key 'default_prompt_name' is {name!r:.60}, which 'prompts' does not have")
    return name


def _read_similarity(settings: _Object) -> str:
    name: str = settings.choice("similarity_fn_name", {name: name for name in _SIMILARITIES}, "cosine")
    return name


def _read_json(path: Path, *, is_needed: bool) -> Any:
    """The content of a file of bounded size; None where it is not there and need not be."""
    if not os.path.lexists(path) and not is_needed:
        return None
    try:
        if not path.is_file():
            _refuse(path, "is missing" if not path.exists() else "is not a regular file")
        with path.open("rb") as file:
            data = file.read(_MAX_JSON_BYTES + 1)
        if len(data) > _MAX_JSON_BYTES:
            _refuse(path, f"is larger than {_MAX_JSON_BYTES} bytes")
        return json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}.") from error


def _refuse(path: Path, reason: str) -> NoReturn:
    raise CheckpointError(f"{path}: {reason}.")
