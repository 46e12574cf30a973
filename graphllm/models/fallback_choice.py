"""Who computes a model: our own decoder, or transformers' module.

Owns the choice, and the answer where only a configuration is there. The module's way is
`transformers_fallback.py`'s.
"""

from __future__ import annotations

from graphllm.errors import ConfigError
from graphllm.models.dummy import DummyCheckpoint
from graphllm.models.registry import FAMILIES, Configured


def fallback_architecture(checkpoint: Configured, *, model_impl: str) -> str | None:
    """The architecture that transformers is asked for, None where our own decoder computes the model.

    model_impl: `--model-impl`: "auto" falls back where no family answers to the architecture, "graphllm"
    never and "transformers" always.
    """
    names = checkpoint.hf_config.get("architectures")
    if model_impl == "graphllm" or not isinstance(names, list) or len(names) != 1:
        return None  # the registry says what is wrong with the latter
    architecture = names[0]
    if not isinstance(architecture, str):
        return None
    if model_impl == "auto" and any(architecture in family.architectures for family in FAMILIES):
        return None
    return architecture


def refuse_without_weights(checkpoint: DummyCheckpoint, *, model_impl: str, what: str) -> None:
    """Raise ConfigError where transformers' module would compute the model: how it stores weights, and what
    its steps allocate, is not known without it.

    what: the beginning of what is said of declared families. A model that nobody knows is left to the
    registry.
    """
    architecture = fallback_architecture(checkpoint, model_impl=model_impl)
    if architecture is None:
        return
    asked = model_impl == "transformers"
    if not asked and not is_known_to_transformers(architecture, checkpoint.hf_config.get("model_type")):
        return
    raise ConfigError(
        f"{checkpoint.path}: architecture {architecture!r} would run through transformers' own module"
        f"{' (--model-impl transformers)' if asked else ''}; {what} families that graphllm computes itself "
        "only, which docs/models.md lists."
    )


def is_known_to_transformers(architecture: str, model_type: object) -> bool:
    """Whether transformers, where it is installed, has a language model of this name."""
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError:
        return False
    named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) if isinstance(model_type, str) else None
    return named is not None and architecture in (named if isinstance(named, tuple) else (named,))
