"""Times one decode step of a model of the demo's shape, with random weights, on the CPU.

    python -m benchmarks.decode_step --rows 1 4 16 --context 200

Prints a table, the best of several steps in milliseconds, split into linear layers, attention (without the
cache write) and the rest; the last line is the same as JSON. No scheduler, no sampling, no server.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from graphllm.arena import Arena
from graphllm.attention.backend import (
    AttentionBucket,
    AttentionInputs,
    AttentionMetadata,
    AttentionSpec,
    GroupInputs,
    LayerCache,
)
from graphllm.attention.paged import PagedAttention
from graphllm.cache.kv_cache import KVCache, KVCacheShape
from graphllm.kernels.linear import LinearProduct, give_threads, linear_openblas, linear_ref
from graphllm.layers.norm import NormConfig
from graphllm.layers.rotary import RotaryConfig
from graphllm.models.config import LayerConfig, ModelConfig
from graphllm.models.decoder import Decoder
from graphllm.models.weights import choose_product
from graphllm.quant.scheme_source import one_scheme
from graphllm.quant.unquantized import Unquantized

DEMO_SHAPE = ModelConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    layers=30 * (LayerConfig(rotary=RotaryConfig(rotary_dim=64, theta=100000.0)),),
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    norm=NormConfig(eps=1e-5),
    attention_scale=64**-0.5,
    activation="silu",
    tie_word_embeddings=True,
)
BLOCK_SIZE = 16
CPU = torch.device("cpu")


class TimedProduct:
    """A LinearProduct that adds up its time."""

    def __init__(self, product: LinearProduct) -> None:
        self.product = product
        self.seconds = 0.0

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> torch.Tensor:
        start = time.perf_counter()
        result = self.product(x, weight, bias, out)
        self.seconds += time.perf_counter() - start
        return result


class TimedAttention(PagedAttention):
    """A PagedAttention that adds up its time."""

    seconds = 0.0

    def begin_step(self, metadata: AttentionMetadata) -> None:
        start = time.perf_counter()
        super().begin_step(metadata)
        self.seconds += time.perf_counter() - start

    def forward(
        self,
        query: torch.Tensor,
        *,
        layer_cache: LayerCache,
        spec: AttentionSpec,
        metadata: AttentionMetadata,
        sinks: torch.Tensor | None = None,
        slopes: torch.Tensor | None = None,
        out: torch.Tensor,
    ) -> None:
        start = time.perf_counter()
        super().forward(
            query,
            layer_cache=layer_cache,
            spec=spec,
            metadata=metadata,
            sinks=sinks,
            slopes=slopes,
            out=out,
        )
        self.seconds += time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class StepTime:
    """Milliseconds of the best step, and of its parts."""

    rows: int
    total: float
    linear: float
    attention: float

    @property
    def rest(self) -> float:
        return self.total - self.linear - self.attention


class DecodeStep:
    """A model, its cache and sequences of one length, ready to decode again and again."""

    def __init__(self, config: ModelConfig, product: LinearProduct, *, dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype
        self.product = TimedProduct(product)
        self.backend = TimedAttention(block_size=BLOCK_SIZE)
        self.arena = Arena(CPU)
        scheme = Unquantized(self.product)
        self.model = Decoder(
            config, backend=self.backend, schemes=one_scheme(scheme), device=CPU, dtype=dtype
        ).eval()
        for parameter in self.model.parameters():
            parameter.normal_(0.0, 0.02)

    def prepare(self, rows: int, context: int) -> tuple[KVCache, AttentionInputs]:
        """A cache full of random keys and values, and the inputs of `rows` decode rows."""
        blocks_each = -(-context // BLOCK_SIZE)
        shape = KVCacheShape(
            self.config.num_layers, self.config.num_kv_heads, self.config.head_dim, BLOCK_SIZE, self.dtype
        )
        cache = KVCache(shape, 1 + rows * blocks_each, device=CPU)
        for pool in cache.pools.pools:
            pool.normal_()
        tables = (1 + torch.randperm(rows * blocks_each)).view(rows, blocks_each).int()
        positions = torch.full((rows,), context - 1)
        inputs = AttentionInputs(
            row_slots=torch.arange(rows),
            query_lens=torch.ones(rows, dtype=torch.int64),
            context_lens=positions + 1,
            query_starts=torch.arange(rows + 1),
            positions=positions,
            groups=(
                GroupInputs(
                    slot_mapping=tables[:, -1].long() * BLOCK_SIZE + (context - 1) % BLOCK_SIZE,
                    block_tables=tables,
                ),
            ),
        )
        return cache, inputs

    def run(self, cache: KVCache, inputs: AttentionInputs) -> StepTime:
        """One step, from token ids to logits."""
        rows = len(inputs.positions)
        input_ids = torch.randint(self.config.vocab_size, (rows,))
        self.product.seconds = self.backend.seconds = 0.0
        start = time.perf_counter()
        metadata = self.backend.plan(inputs, AttentionBucket(rows, rows, rows))
        self.backend.begin_step(metadata)
        self.model(
            input_ids,
            inputs.positions,
            layer_caches=cache.layers,
            metadata=metadata,
            arena=self.arena,
            sampled_tokens=torch.arange(rows),
            logits=self.arena.take("logits", rows, self.config.vocab_size, dtype=torch.float32),
        )
        total = time.perf_counter() - start
        return StepTime(rows, total * 1e3, self.product.seconds * 1e3, self.backend.seconds * 1e3)


@torch.inference_mode()
def measure(
    config: ModelConfig,
    product: LinearProduct,
    *,
    dtype: torch.dtype,
    rows: Sequence[int],
    context: int,
    steps: int,
) -> list[StepTime]:
    """The best of `steps` steps for each number of rows."""
    decode = DecodeStep(config, product, dtype=dtype)
    times = []
    for num_rows in rows:
        cache, inputs = decode.prepare(num_rows, context)
        decode.run(cache, inputs)
        times.append(min((decode.run(cache, inputs) for _ in range(steps)), key=lambda step: step.total))
    return times


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the flags, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16], help="rows (sequences) in a step")
    parser.add_argument("--context", type=int, default=200, help="tokens in the cache of each row")
    parser.add_argument("--steps", type=int, default=20, help="steps, of which the best counts")
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="threads of the library behind the linear layers",
    )
    parser.add_argument("--layers", type=int, default=DEMO_SHAPE.num_layers, help="layers of the model")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--product", default="auto", choices=("auto", "torch", "openblas"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    dtype: torch.dtype = getattr(torch, options.dtype)
    config = replace(DEMO_SHAPE, layers=options.layers * DEMO_SHAPE.layers[:1])
    products: dict[str, LinearProduct] = {"torch": linear_ref, "openblas": linear_openblas}
    product = products.get(options.product) or choose_product(config, device=CPU, dtype=dtype)
    give_threads(product, options.threads)
    name = next(name for name, known in products.items() if known is product)
    times = measure(
        config, product, dtype=dtype, rows=options.rows, context=options.context, steps=options.steps
    )
    print(f"{options.dtype}, context {options.context}, {options.threads} threads, products by {name}")
    print(f"{'rows':>5}{'step ms':>10}{'linear':>10}{'attention':>11}{'rest':>8}{'tokens/s':>10}")
    for step in times:
        rate = step.rows / step.total * 1e3
        print(
            f"{step.rows:>5}{step.total:>10.2f}{step.linear:>10.2f}{step.attention:>11.2f}"
            f"{step.rest:>8.2f}{rate:>10.1f}"
        )
    result = {
        "benchmark": "decode_step",
        "dtype": options.dtype,
        "context": options.context,
        "threads": options.threads,
        "product": name,
        "layers": options.layers,
        "steps": [
            {
                "rows": step.rows,
                "ms": round(step.total, 3),
                "linear_ms": round(step.linear, 3),
                "attention_ms": round(step.attention, 3),
                "rest_ms": round(step.rest, 3),
            }
            for step in times
        ],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
