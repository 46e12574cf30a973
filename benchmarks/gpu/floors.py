"""What the hardware allows: the bytes a step must read, the products a prompt must do.

Owns the arithmetic, from a model's config.json and the ceilings measured in the same run. Measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPES_FOLDER = Path(__file__).resolve().parents[1] / "shapes"
SHAPES = ("llama-3.1-8b", "llama-3.2-1b", "qwen3-0.6b")


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this card reached in this run: bytes a second of a large copy, read and written bytes both
    counted, and floating-point operations a second of a large bfloat16 product."""

    bytes_per_second: float
    flops_per_second: float


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that decide a dense decoder's cost.

    num_layer_weights: elements of the matrices of all layers, which multiply every token.
    num_other_weights: elements of norms and biases. num_head_weights: elements of the output head, which
    multiplies sampled tokens only; the embedding table is not counted, of which a token reads one row.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    vocab_size: int
    num_layer_weights: int
    num_other_weights: int
    num_head_weights: int

    @staticmethod
    def of(config: Mapping[str, Any]) -> ModelShape:
        """From a config.json of a Llama or Qwen3 model."""
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or hidden // heads
        projections = hidden * (heads + 2 * kv_heads) * head_dim + heads * head_dim * hidden
        feed_forward = 3 * hidden * config["intermediate_size"]
        head_norms = 2 * head_dim if config.get("model_type") == "qwen3" else 0
        return ModelShape(
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_context=config["max_position_embeddings"],
            vocab_size=config["vocab_size"],
            num_layer_weights=layers * (projections + feed_forward),
            num_other_weights=layers * (2 * hidden + head_norms) + hidden,
            num_head_weights=config["vocab_size"] * hidden,
        )

    @property
    def num_kv_elements(self) -> int:
        """Key and value elements of one token, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def decode_bytes(self, num_rows: int, context: int, *, layer_bits: int = 16) -> int:
        """What a decode step must read: every weight once, and each row's keys and values.

        layer_bits: of a weight of the layers' matrices; everything else has 16.
        """
        others = self.num_other_weights + self.num_head_weights + num_rows * context * self.num_kv_elements
        return layer_bits * self.num_layer_weights // 8 + 2 * others

    def prefill_flops(self, num_tokens: int) -> int:
        """Operations of one prompt: products of every token, causal attention, the head for one token."""
        products = 2 * num_tokens * self.num_layer_weights + 2 * self.num_head_weights
        # Two products, each of every query with the keys up to its own.
        num_scores = num_tokens * (num_tokens + 1) // 2
        return products + 4 * self.num_layers * self.num_heads * self.head_dim * num_scores

    def decode_floor_ms(
        self, num_rows: int, context: int, ceilings: Ceilings, *, layer_bits: int = 16
    ) -> float:
        """A step's least time: reading, or multiplying in bfloat16 where rows are many."""
        reading = self.decode_bytes(num_rows, context, layer_bits=layer_bits) / ceilings.bytes_per_second
        multiplying = (
            2 * num_rows * (self.num_layer_weights + self.num_head_weights) / ceilings.flops_per_second
        )
        return 1e3 * max(reading, multiplying)

    def prefill_floor_ms(self, num_tokens: int, ceilings: Ceilings) -> float:
        """A prompt's least time: multiplying, or reading the weights where it is short."""
        reading = self.decode_bytes(1, num_tokens) / ceilings.bytes_per_second
        return 1e3 * max(reading, self.prefill_flops(num_tokens) / ceilings.flops_per_second)


def shape_path(name: str) -> Path:
    """The config.json of a benchmarked model."""
    return SHAPES_FOLDER / f"{name}.json"


def shape_of(name: str) -> ModelShape:
    """The sizes of a benchmarked model. Raises OSError where its file is missing."""
    config: dict[str, Any] = json.loads(shape_path(name).read_text(encoding="utf-8"))
    return ModelShape.of(config)


def context_name(num_tokens: int) -> str:
    """1024 as "1k": what metrics call a context."""
    return f"{num_tokens // 1024}k"
