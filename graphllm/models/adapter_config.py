"""adapter_config.json, as peft writes it: what a LoRA adapter's numbers mean.

Owns which keys are honoured, which change nothing, and which are refused by name because they would.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from graphllm.errors import CheckpointError
from graphllm.models.safetensors_folder import read_json_object

CONFIG_FILE = "adapter_config.json"

_LARGEST_NUMBER = 1e9  # what is no mistake is far below, and float32 far above
# Every layer's name is held against every pattern, between steps. An adversary's pattern of many choices
# would take a name of thirty letters longer than anybody lives, so most have to be plain names.
_MAX_PATTERNS = 1024
_MAX_CHOOSING_PATTERNS = 16
_MAX_CHOICES = 2
_CHOICE = re.compile(r"(?<!\\)(?:[*+{]|\?|\((?!\?))")
_REPEATED_GROUP = re.compile(r"(?<!\\)\)[*+?{]")

Number = TypeVar("Number", int, float)

# About training, about where the adapter comes from, or about tensors that say the same by being there.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
# What peft then does to the base model's weights, beside adding to its products.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_REASONS = {
    "use_dora": "DoRA scales the base model's weights as well",
    "modules_to_save": "it brings whole layers of its own",
    "lora_bias": "its products have biases",
    "target_parameters": "it changes parameters that are no linear layers, as those of experts",
    "trainable_token_indices": "it changes embeddings",
    "alora_invocation_tokens": "it begins to act in the middle of a prompt",
    "layer_replication": "it runs layers several times",
    "megatron_config": "it is for layers in Megatron's form",
    "fan_in_fan_out": "it is for weights that are stored transposed",
    "use_qalora": "it pools the layers' inputs",
    "use_bdlora": "its matrices are in blocks",
}


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What an adapter's configuration says of its layers.

    rank, alpha: of layers that no pattern names. is_rank_stabilized: alpha is divided by the rank's root
    (Kalajdzievski, 2023, arXiv:2312.03732). targets: ends of layers' names, None where a pattern says it.
    is_partial: some of the layers that `targets` means are left out on purpose.
    """

    path: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[re.Pattern[str], int]
    alpha_pattern: Mapping[re.Pattern[str], float]
    is_rank_stabilized: bool
    targets: tuple[str, ...] | None
    is_partial: bool

    def rank_of(self, name: str) -> int:
        return _by_pattern(self.rank_pattern, name, self.rank)

    def scale_of(self, name: str) -> float:
        """What the product of both matrices is multiplied by."""
        alpha, rank = _by_pattern(self.alpha_pattern, name, self.alpha), self.rank_of(name)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilized else rank)

    def is_target(self, name: str) -> bool:
        return self.targets is None or any(_ends_with(name, target) for target in self.targets)


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _by_pattern(values: Mapping[re.Pattern[str], Number], name: str, default: Number) -> Number:
    """The value of the first pattern that matches the name."""
    return next((value for pattern, value in values.items() if pattern.match(name)), default)


def read_lora_config(folder: Path) -> LoraConfig:
    """Read a folder's adapter_config.json. Raises CheckpointError, naming the file and the key at fault."""
    reader = _Reader(folder / CONFIG_FILE)
    kind = reader.take("peft_type")
    if kind != "LORA":
        reader.refuse("peft_type", f"is {kind!r}; LORA is what is served")
    rank = reader.rank("r", reader.take("r"))
    alpha = reader.number("lora_alpha", reader.take("lora_alpha", 8))
    ranks = {key: reader.rank("rank_pattern", value) for key, value in reader.patterns("rank_pattern")}
    alphas = {key: reader.number("alpha_pattern", value) for key, value in reader.patterns("alpha_pattern")}
    is_rank_stabilized = reader.flag("use_rslora")
    if (bias := reader.take("bias", "none")) != "none":
        reader.refuse("bias", f"is {bias!r}: biases of the base model stay as they are")
    init = reader.take("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        reader.refuse(
            "init_lora_weights", f"is {init!r}: the adapter is for a base model that it has changed"
        )
    targets = reader.targets()
    is_partial = any(reader.value(key) for key in ("layers_to_transform", "exclude_modules"))
    for key, reason in _REASONS.items():
        if reader.take(key, None):
            reader.refuse(key, f"is set: {reason}, which is not served")
    reader.check_understood()
    return LoraConfig(reader.path, rank, alpha, ranks, alphas, is_rank_stabilized, targets, is_partial)


class _Reader:
    """Checked access to the file's keys."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._left = read_json_object(path)

    def refuse(self, key: str, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {key!r} {reason}.")

    def value(self, key: str) -> Any:
        return self._left.get(key)

    def take(self, key: str, *default: Any) -> Any:
        if key not in self._left and not default:
            self.refuse(key, "is missing")
        return self._left.pop(key, *default)

    def flag(self, key: str) -> bool:
        value = self.take(key, False)
        if not isinstance(value, bool):
            self.refuse(key, f"is {value!r}, which is neither true nor false")
        return value

    def rank(self, key: str, value: Any) -> int:
        if type(value) is not int or value < 1:
            self.refuse(key, f"has {value!r}, which is no rank")
        return value

    def number(self, key: str, value: Any) -> float:
        if type(value) not in (int, float) or not abs(value) <= _LARGEST_NUMBER:
            self.refuse(key, f"has {value!r}, which is no number that a layer can be multiplied by")
        return float(value)

    def patterns(self, key: str) -> list[tuple[re.Pattern[str], Any]]:
        """Each matches the names of layers that it means: those that end in it, as peft has it."""
        value = self.take(key, None) or {}
        if not isinstance(value, dict):
            self.refuse(key, f"is {value!r}, which is no map from layers")
        num_choosing = sum(_CHOICE.search(text) is not None for text in value)
        if len(value) > _MAX_PATTERNS or num_choosing > _MAX_CHOOSING_PATTERNS:
            self.refuse(
                key,
                f"has {len(value)} patterns, {num_choosing} of which are more than a name; "
                f"at most {_MAX_PATTERNS} and {_MAX_CHOOSING_PATTERNS} are looked through",
            )
        return [(self._pattern(key, text), found) for text, found in value.items()]

    def _pattern(self, key: str, text: str) -> re.Pattern[str]:
        if len(_CHOICE.findall(text)) > _MAX_CHOICES or _REPEATED_GROUP.search(text):
            self.refuse(
                key,
                f"has {text!r}; at most {_MAX_CHOICES} repetitions and groups, and none of groups, are tried",
            )
        try:
            return re.compile(rf"(?:.*\.)?(?:{text})$")
        except (re.error, RecursionError, OverflowError) as error:
            self.refuse(key, f"has {text!r}, which is no pattern: {error}")

    def targets(self) -> tuple[str, ...] | None:
        value = self.take("target_modules", None)
        if value is None or isinstance(value, str):  # a pattern: the tensors say what it means
            return None
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            self.refuse("target_modules", f"is {value!r}, which is no list of layers")
        return tuple(value)

    def check_understood(self) -> None:
        for key, value in self._left.items():
            if key not in _HARMLESS and value not in (None, False, [], {}, ""):
                self.refuse(key, f"is {value!r}, and nobody here knows what that changes")
