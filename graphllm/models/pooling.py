"""What a model gives for a whole text: a vector, or a score for each of several labels.

Owns what its files say of that (`PoolingConfig`), and the layers from a pooled hidden state to the result
(`Pooler`), always in float32. Which tokens' states are pooled, and when, is the runner's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

from graphllm.errors import CheckpointError
from graphllm.models.checkpoint import Checkpoint
from graphllm.models.config import ModelConfig
from graphllm.models.dummy import STANDARD_DEVIATION, DummyCheckpoint
from graphllm.models.family import Family, Pooling, PoolingMethod
from graphllm.models.safetensors_folder import WEIGHTS_FILE
from graphllm.models.sentence_transformers import (
    MODULES_FILE,
    SentenceTransformer,
    has_sentence_transformer,
    read_cross_encoder_activation,
    read_sentence_transformer,
)
from graphllm.tokenizer.tokenizer import Tokenizer

Purpose = Literal["generate", "embed", "score"]
ScoreActivation = Literal["identity", "sigmoid", "softmax"]

_GENERATING = Pooling(method="last")
_ACTIVATIONS: Mapping[str, ScoreActivation] = {
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.linear.Identity": "identity",
}
_ACTIVATION_OF_PROBLEM: Mapping[str, ScoreActivation] = {
    "regression": "identity",
    "multi_label_classification": "sigmoid",
}
# What transformers assumes of a file that does not say it.
_DEFAULT_NUM_LABELS = 2


@dataclass(frozen=True, slots=True)
class PoolerLayer:
    """A linear layer behind pooling. source: its module in the checkpoint, or the folder that holds it."""

    source: str
    in_features: int
    out_features: int
    has_bias: bool
    has_tanh: bool
    is_folder: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingConfig:
    """What a model is for, and what becomes of a text's hidden states.

    layers: from the pooled state on. score_tokens: as in `family.Pooling`; the one layer is then made of the
    head. normalizes: vectors were published with length 1. can_be_cut: a vector's first numbers are one by
    themselves, by their makers' word (Kusupati et al., 2022, arXiv:2205.13147); sizes: the only numbers of
    them that are allowed, none for any. labels: what the scores are of; activation: what makes numbers
    between 0 and 1 of them. type_stride: what a token's type adds to its id, for models that tell a second
    text by it, else 0. max_tokens, lowercases, prompts, default_prompt, similarity: as in
    `SentenceTransformer`.
    """

    purpose: Purpose
    method: PoolingMethod
    hidden_size: int
    layers: tuple[PoolerLayer, ...] = ()
    score_tokens: tuple[str, str] | None = None
    normalizes: bool = True
    can_be_cut: bool = False
    sizes: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    activation: ScoreActivation = "identity"
    type_stride: int = 0
    max_tokens: int | None = None
    lowercases: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    similarity: str = "cosine"

    @property
    def output_size(self) -> int:
        """Numbers in a text's result."""
        return self.layers[-1].out_features if self.layers else self.hidden_size

    @property
    def needs_all_tokens(self) -> bool:
        """Whether states of other tokens than the last are wanted, which no cached block can give."""
        return self.method != "last"


def read_pooling(
    checkpoint: Checkpoint | DummyCheckpoint, family: Family | None, config: ModelConfig
) -> PoolingConfig:
    """What the checkpoint's files say. family: None for models through transformers, which generate.

    Raises CheckpointError that names the file, and the key, at fault.
    """
    pooling = (None if family is None else family.pooling) or _GENERATING
    if pooling.score_layers or pooling.score_tokens:
        return _read_scores(checkpoint, pooling, config)
    is_for_vectors = family is not None and family.pooling is not None
    published = SentenceTransformer(method=pooling.method, normalizes=True)
    if is_for_vectors and has_sentence_transformer(checkpoint.path):
        published = read_sentence_transformer(checkpoint.path)
        if published.width is not None and published.width != config.hidden_size:
            raise CheckpointError(
                f"{checkpoint.path}: {MODULES_FILE}'s Pooling is of states of {published.width} numbers, and "
                f"the model's have {config.hidden_size}."
            )
    can_be_cut, sizes = _read_sizes(checkpoint)
    layers = tuple(
        PoolerLayer(
            each.folder, each.in_features, each.out_features, each.has_bias, each.has_tanh, is_folder=True
        )
        for each in published.dense
    )
    _check_sizes(checkpoint.path, layers, hidden_size=config.hidden_size)
    return PoolingConfig(
        purpose="embed" if is_for_vectors else "generate",
        method=published.method,
        hidden_size=config.hidden_size,
        layers=layers,
        normalizes=published.normalizes,
        can_be_cut=can_be_cut,
        sizes=sizes,
        max_tokens=published.max_tokens,
        lowercases=published.lowercases,
        prompts=published.prompts,
        default_prompt=published.default_prompt,
        similarity=published.similarity,
    )


def _read_scores(
    checkpoint: Checkpoint | DummyCheckpoint, pooling: Pooling, config: ModelConfig
) -> PoolingConfig:
    layers: tuple[PoolerLayer, ...]
    labels: tuple[str, ...]
    if pooling.score_tokens is not None:
        layers, labels = (PoolerLayer("", config.hidden_size, 1, False, False),), (pooling.score_tokens[1],)
    else:
        layers = _score_layers(checkpoint, pooling, config)
        labels = _read_labels(checkpoint, num_labels=layers[-1].out_features)
    _check_sizes(checkpoint.path, layers, hidden_size=config.hidden_size)
    return PoolingConfig(
        purpose="score",
        method=pooling.method,
        hidden_size=config.hidden_size,
        layers=layers,
        score_tokens=pooling.score_tokens,
        normalizes=False,
        labels=labels,
        activation=_read_activation(checkpoint, num_labels=len(labels)),
        type_stride=config.vocab_size // config.num_used_token_types
        if config.num_used_token_types > 1
        else 0,
    )


def _score_layers(
    checkpoint: Checkpoint | DummyCheckpoint, pooling: Pooling, config: ModelConfig
) -> tuple[PoolerLayer, ...]:
    """The sizes are the tensors' own; without tensors, those that the configuration implies."""
    if isinstance(checkpoint, DummyCheckpoint):
        size, num_labels = config.hidden_size, len(_id2label(checkpoint)) or _DEFAULT_NUM_LABELS
        *inner, last = pooling.score_layers
        return (
            *(PoolerLayer(each.name, size, size, True, each.has_tanh) for each in inner),
            PoolerLayer(last.name, size, num_labels, False, last.has_tanh),
        )
    names, layers = checkpoint.tensor_names(), []
    for each in pooling.score_layers:
        weight = f"{each.name}.weight"
        if weight not in names:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {weight!r}, which makes the scores, is missing."
            )
        shape = checkpoint.tensor_shape(weight)
        if len(shape) != 2:
            raise CheckpointError(f"{checkpoint.path}: tensor {weight!r} has shape {list(shape)}.")
        layers.append(PoolerLayer(each.name, shape[1], shape[0], f"{each.name}.bias" in names, each.has_tanh))
    return tuple(layers)


def _check_sizes(path: Path, layers: Sequence[PoolerLayer], *, hidden_size: int) -> None:
    size = hidden_size
    for layer in layers:
        if layer.in_features != size:
            raise CheckpointError(
                f"{path}: {layer.source} takes {layer.in_features} numbers, and {size} come before it."
            )
        size = layer.out_features


def _id2label(checkpoint: Checkpoint | DummyCheckpoint) -> dict[str, Any]:
    labels = checkpoint.hf_config.get("id2label")
    return labels if isinstance(labels, dict) else {}


def _read_labels(checkpoint: Checkpoint | DummyCheckpoint, *, num_labels: int) -> tuple[str, ...]:
    """`id2label`, whose keys JSON has made texts of; LABEL_0 and so on where the file has none."""
    names = {str(key): value for key, value in _id2label(checkpoint).items()}
    if not names:
        return tuple(f"LABEL_{index}" for index in range(num_labels))
    if set(names) != {str(index) for index in range(num_labels)}:
        _refuse_key(checkpoint, "id2label", f"has {len(names)} labels, and {num_labels} scores are computed")
    return tuple(str(names[str(index)]) for index in range(num_labels))


def _read_activation(checkpoint: Checkpoint | DummyCheckpoint, *, num_labels: int) -> ScoreActivation:
    """The makers' word for cross-encoders, in one of three places.

    Else what transformers' pipeline does with so many labels.
    """
    section = checkpoint.hf_config.get("sentence_transformers")
    key, name = "sentence_transformers", section.get("activation_fn") if isinstance(section, dict) else None
    if name is None:
        key = "sbert_ce_default_activation_function"
        name = checkpoint.hf_config.get(key)
    if name is None:
        key, name = "activation_fn", read_cross_encoder_activation(checkpoint.path)
    if name is not None:
        if name not in _ACTIVATIONS:
            _refuse_key(checkpoint, key, f"asks for {name!r:.80}; supported are {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[name]
    problem = checkpoint.hf_config.get("problem_type")
    if isinstance(problem, str) and problem in _ACTIVATION_OF_PROBLEM:
        return _ACTIVATION_OF_PROBLEM[problem]
    return "sigmoid" if num_labels == 1 else "softmax"


def _read_sizes(checkpoint: Checkpoint | DummyCheckpoint) -> tuple[bool, tuple[int, ...]]:
    """Whether vectors may be cut, and to which sizes (none: to any)."""
    sizes = checkpoint.hf_config.get("matryoshka_dimensions")
    if sizes is None:
        return checkpoint.hf_config.get("is_matryoshka") is True, ()
    if not isinstance(sizes, list) or not all(type(size) is int and size > 0 for size in sizes):
        _refuse_key(checkpoint, "matryoshka_dimensions", f"is {sizes!r:.60}, not a list of sizes")
    return True, tuple(sorted(sizes))


def _refuse_key(checkpoint: Checkpoint | DummyCheckpoint, key: str, reason: str) -> NoReturn:
    raise CheckpointError(f"{checkpoint.path}: configuration key {key!r} {reason}.")


class Pooler(nn.Module):
    """From pooled hidden states to results, in float32. Parameters are uninitialized until loaded."""

    def __init__(self, config: PoolingConfig, *, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.weights = nn.ParameterList(
            _empty(each.out_features, each.in_features, device=device) for each in config.layers
        )
        self.biases = nn.ParameterList(
            _empty(each.out_features if each.has_bias else 0, device=device) for each in config.layers
        )

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """pooled: [num_texts, hidden_size] float32; returns [num_texts, output_size], scores as logits."""
        for layer, weight, bias in zip(self.config.layers, self.weights, self.biases, strict=True):
            pooled = F.linear(pooled, weight, bias if layer.has_bias else None)
            if layer.has_tanh:
                pooled = pooled.tanh_()
        return pooled


def _empty(*size: int, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(*size, dtype=torch.float32, device=device), requires_grad=False)


def load_pooler(
    checkpoint: Checkpoint | DummyCheckpoint,
    config: PoolingConfig,
    *,
    tokenizer: Tokenizer,
    device: torch.device,
) -> Pooler:
    """Build the layers on `device`. tokenizer: tells the ids of `score_tokens`.

    Raises CheckpointError that names the file, and the tensor, at fault.
    """
    pooler = Pooler(config, device=device)
    if isinstance(checkpoint, DummyCheckpoint):
        for parameter in pooler.parameters():
            parameter.data.normal_(0.0, STANDARD_DEVIATION, generator=torch.Generator(device).manual_seed(0))
        return pooler
    if config.score_tokens is not None:
        pooler.weights[0].data.copy_(_difference_of_tokens(checkpoint, config.score_tokens, tokenizer))
        return pooler
    for layer, weight, bias in zip(config.layers, pooler.weights, pooler.biases, strict=True):
        tensors = _read_folder(checkpoint.path, layer) if layer.is_folder else _read_module(checkpoint, layer)
        for parameter, name in ((weight, "weight"), (bias, "bias")):
            if name == "bias" and not layer.has_bias:
                continue
            tensor = tensors[name]
            if tensor.shape != parameter.shape or not tensor.is_floating_point():
                raise CheckpointError(
                    f"{checkpoint.path}: {layer.source}: the {name} has shape {list(tensor.shape)}; "
                    f"{list(parameter.shape)} of floating-point numbers are needed."
                )
            parameter.data.copy_(tensor)
    return pooler


def _read_module(checkpoint: Checkpoint, layer: PoolerLayer) -> dict[str, torch.Tensor]:
    names = ("weight", "bias") if layer.has_bias else ("weight",)
    return {name: checkpoint.tensor(f"{layer.source}.{name}") for name in names}


def _read_folder(path: Path, layer: PoolerLayer) -> dict[str, torch.Tensor]:
    """A Dense module's two tensors, in a file of their own."""
    file = path / layer.source / WEIGHTS_FILE
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; it holds a layer behind pooling.")
    wanted = {f"linear.{name}" for name in (("weight", "bias") if layer.has_bias else ("weight",))}
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            if set(tensors.keys()) != wanted:
                has, needs = (", ".join(sorted(names)) for names in (tensors.keys(), wanted))
                raise CheckpointError(f"{file}: it has the tensors {has}; {needs} are needed.")
            return {name.removeprefix("linear."): tensors.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}.") from error


def _difference_of_tokens(
    checkpoint: Checkpoint, tokens: tuple[str, str], tokenizer: Tokenizer
) -> torch.Tensor:
    """The head's row for the second token less that for the first, [1, hidden_size] float32.

    By it a state has the difference of the two logits, whose sigmoid is the second token's probability among
    the two.
    """
    token_ids = []
    for text in tokens:
        found = tokenizer.encode(text, add_special_tokens=False)
        if len(found) != 1:
            raise CheckpointError(
                f"{checkpoint.path}: {text!r}, which scores are read from, is no single token."
            )
        token_ids += found
    stored = checkpoint.tensor_names()
    candidates = ("lm_head.weight", "model.embed_tokens.weight", "embed_tokens.weight")
    name = next((name for name in candidates if name in stored), None)
    if name is None:
        raise CheckpointError(f"{checkpoint.path}: it has no tensor {candidates[0]!r} nor {candidates[1]!r}.")
    rows = checkpoint.tensor(name)[token_ids].float()
    return rows[1:] - rows[:1]
