"""A decode step as plainly as torch can say it, in one CUDA graph: cuBLAS, SDPA, and nothing of ours.

    python -m benchmarks.peers.plain_graph --shapes llama-3.2-1b

A peer: dense key and value tensors instead of pages, a context length that is baked into the graph, one
batch size, greedy tokens. Merged query-key-value and gate-up products, as everybody has them. Rotary
frequencies are left unscaled, which costs the same. Prints a JSON line for each model: shape, batch,
context, and the step's milliseconds. The weights are those of `benchmarks/gpu/weights.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from benchmarks.gpu.floors import SHAPES
from benchmarks.gpu.timing import captured, time_on_device
from benchmarks.gpu.weights import draw_weights, read_shape


class PlainModel:
    """A Llama or Qwen3 decoder that decodes one token a row, with `position` known to the host.

    keys, values: [batch, num_kv_heads, max_context, head_dim] of each layer.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Iterable[tuple[str, torch.Tensor]],
        *,
        batch: int,
        max_context: int,
    ) -> None:
        self.eps = config["rms_norm_eps"]
        self.num_layers = config["num_hidden_layers"]
        self.num_heads = config["num_attention_heads"]
        self.num_kv_heads = config.get("num_key_value_heads") or self.num_heads
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.num_heads
        self.weights = _merged(dict(weights), self.num_layers)
        embedding = self.weights["model.embed_tokens.weight"]
        self.head = self.weights.get("lm_head.weight", embedding)
        size = (batch, self.num_kv_heads, max_context, self.head_dim)
        options: dict[str, Any] = {"dtype": embedding.dtype, "device": embedding.device}
        self.keys = [torch.zeros(size, **options) for _ in range(self.num_layers)]
        self.values = [torch.zeros(size, **options) for _ in range(self.num_layers)]
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=embedding.device)
        self.frequencies = config["rope_theta"] ** (-exponents / self.head_dim)  # [head_dim / 2] float32

    def step(self, token_ids: torch.Tensor, position: int) -> torch.Tensor:
        """Logits of the token behind `token_ids` [batch], which stand at `position`: [batch, vocab_size]."""
        weights = self.weights
        hidden = functional.embedding(token_ids, weights["model.embed_tokens.weight"])
        angles = position * self.frequencies
        cos, sin = (table.repeat(2).to(hidden.dtype) for table in (angles.cos(), angles.sin()))
        for layer in range(self.num_layers):
            name = f"model.layers.{layer}"
            normed = self._norm(hidden, f"{name}.input_layernorm.weight")
            hidden = hidden + self._attend(normed, layer, position=position, cos=cos, sin=sin)
            normed = self._norm(hidden, f"{name}.post_attention_layernorm.weight")
            gate, up = functional.linear(normed, weights[f"{name}.gate_up"]).chunk(2, dim=-1)
            hidden = hidden + functional.linear(
                functional.silu(gate) * up, weights[f"{name}.mlp.down_proj.weight"]
            )
        return functional.linear(self._norm(hidden, "model.norm.weight"), self.head)

    def _attend(
        self, normed: torch.Tensor, layer: int, *, position: int, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        name = f"model.layers.{layer}.self_attn"
        qkv = functional.linear(normed, self.weights[f"{name}.qkv"])
        heads = qkv.view(len(qkv), -1, self.head_dim)  # [batch, heads + 2 kv_heads, head_dim]
        query, rest = heads[:, : self.num_heads], heads[:, self.num_heads :]
        key, value = rest.chunk(2, dim=1)
        if f"{name}.q_norm.weight" in self.weights:
            query = self._norm(query, f"{name}.q_norm.weight")
            key = self._norm(key, f"{name}.k_norm.weight")
        query, key = (x * cos + _half_turned(x) * sin for x in (query, key))
        self.keys[layer][:, :, position] = key
        self.values[layer][:, :, position] = value
        attended = functional.scaled_dot_product_attention(
            query.unsqueeze(2),
            self.keys[layer][:, :, : position + 1],
            self.values[layer][:, :, : position + 1],
            enable_gqa=True,
        )
        return functional.linear(attended.reshape(len(qkv), -1), self.weights[f"{name}.o_proj.weight"])

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self.weights[name]
        return functional.rms_norm(x, weight.shape, weight, self.eps)


def _half_turned(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _merged(weights: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """Query, key and value as one weight a layer, and gate and up."""
    for layer in range(num_layers):
        name = f"model.layers.{layer}"
        parts = [weights.pop(f"{name}.self_attn.{part}_proj.weight") for part in "qkv"]
        weights[f"{name}.self_attn.qkv"] = torch.cat(parts)
        parts = [weights.pop(f"{name}.mlp.{part}_proj.weight") for part in ("gate", "up")]
        weights[f"{name}.gate_up"] = torch.cat(parts)
    return weights


@torch.inference_mode()
def measure(shape: str, *, batch: int, context: int) -> float:
    """Milliseconds of a replay: a step from token ids to the next token ids."""
    config = read_shape(shape)
    device = torch.device("cuda")
    model = PlainModel(config, draw_weights(config, device), batch=batch, max_context=context)
    for layer in (*model.keys, *model.values):
        layer.normal_()
    token_ids = torch.randint(config["vocab_size"], (batch,), device=device)

    def step() -> None:
        token_ids.copy_(model.step(token_ids, context - 1).argmax(dim=-1))

    graph = captured(step)
    return time_on_device(graph.replay, repeats=10, groups=25).median


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="models (all)")
    parser.add_argument("--batch", type=int, default=1, help="rows (1)")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each row (1024)")
    options = parser.parse_args(argv)
    for shape in options.shapes:
        answer: dict[str, Any] = {
            "mode": "step",
            "shape": shape,
            "batch": options.batch,
            "context": options.context,
        }
        try:
            answer["ms"] = measure(shape, batch=options.batch, context=options.context)
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), flush=True)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
