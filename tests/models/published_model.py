"""How a published model is written down: its name, its size, and what its config.json says.

Owns the form, and shorthands for what many files have in common; the models are in `published_configs.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """name: on the Hub. num_parameters: as its page says. config: config.json, as a dict."""

    name: str
    num_parameters: float
    config: dict[str, Any]


def with_keys(config: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """The file of a sister model: other values, and keys that one file has and the other has not."""
    return config | keys


def alternating(num_layers: int, *, every: int) -> list[str]:
    """`layer_types` of which each every-th is full."""
    return ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(num_layers)]


def shape(
    hidden_size: int, intermediate_size: int, *, layers: int, heads: int, key_heads: int
) -> dict[str, int]:
    """The five keys that most files call alike."""
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
    }
