"""Which class of transformers a checkpoint's configuration names, and what it makes of the keys.

Owns when code that comes with a checkpoint may run: never but with `--trust-remote-code`. What the class can
be used for is `transformers_fallback.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphllm.errors import CheckpointError, ConfigError
from graphllm.models.checkpoint import Checkpoint
from graphllm.models.fallback_choice import is_known_to_transformers
from graphllm.models.hf_keys import GENERATION_KEYS, HARMLESS_KEYS, NEUTRAL_VALUES, QUANTIZATION_KEYS


def find_class(checkpoint: Checkpoint, architecture: str, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """The configuration object and the class of the whole model.

    Raises CheckpointError that names the architecture and why there is none, and ConfigError where
    transformers is not installed.
    """
    try:
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError as error:
        raise ConfigError(
            f"No family of graphllm answers to architecture {architecture!r}, and the fallback needs "
            "transformers: pip install transformers."
        ) from error
    values = checkpoint.hf_config
    model_type = values.get("model_type")
    try:
        if is_known_to_transformers(architecture, model_type):
            return CONFIG_MAPPING[model_type].from_dict(values), getattr(transformers, architecture)
        if "auto_map" in values and trust_remote_code:
            path = str(checkpoint.path)
            hf_config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=True)
            return hf_config, transformers.dynamic_module_utils.get_class_from_dynamic_module(
                values["auto_map"]["AutoModelForCausalLM"], path
            )
    except Exception as error:  # whatever the configuration's class, or the repository's code, trips over
        raise unservable(checkpoint, architecture, f"its configuration is refused: {error}") from error
    if "auto_map" in values:
        raise unservable(
            checkpoint,
            architecture,
            "it brings code of its own, which runs with --trust-remote-code only: read it first",
        )
    if architecture.endswith("ForConditionalGeneration"):
        raise unservable(checkpoint, architecture, "it is no decoder-only model of text")
    raise unservable(
        checkpoint,
        architecture,
        f"neither graphllm nor transformers {transformers.__version__} has a language model of that name",
    )


def unknown_keys(values: Mapping[str, Any], hf_config: Any) -> list[str]:
    """Keys that transformers took over without knowing them: not those of a configuration without a file, nor
    those that need no reading. What transformers makes of them is what is served, so they are no error.
    """
    try:
        default = type(hf_config)()
    except Exception:  # a class whose configuration cannot be left out says nothing of what it knows
        return []
    unread = HARMLESS_KEYS | GENERATION_KEYS | frozenset(QUANTIZATION_KEYS) | NEUTRAL_VALUES.keys()
    return sorted(
        key
        for key, value in values.items()
        if value is not None and key not in unread and hasattr(hf_config, key) and not hasattr(default, key)
    )


def unservable(checkpoint: Checkpoint, architecture: str, reason: str) -> CheckpointError:
    """The error to raise; `reason` may have line breaks, being other people's text."""
    text = " ".join(reason.split())
    return CheckpointError(f"{checkpoint.path}: architecture {architecture!r} is not supported: {text}.")
