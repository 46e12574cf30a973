"""The least that a decode step can take on this machine: bytes to read, products to compute.

Owns the arithmetic and measuring the two ceilings. The ceilings are measured in the same run as the
benchmark, by a helper process (`python -m benchmarks.step_floor`), because a quiet machine and a busy
one differ by more than most of what is compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphllm.models.checkpoint import Checkpoint

BYTES_OF = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What a decode step must touch.

    num_step_weights: elements that every step reads once, whatever its rows: all weights but an
    embedding table that is not also the output head. num_product_weights: those that multiply each
    row (matrices). num_kv_elements: key and value elements of one token, over all layers.
    """

    num_step_weights: int
    num_product_weights: int
    num_kv_elements: int

    @staticmethod
    def of(checkpoint: Checkpoint) -> ModelSize:
        """From the shapes of a checkpoint's tensors."""
        shapes = {name: checkpoint.tensor_shape(name) for name in checkpoint.tensor_names()}
        is_tied = "lm_head.weight" not in shapes
        step = products = 0
        for name, shape in shapes.items():
            num_elements = 1
            for size in shape:
                num_elements *= size
            if name == "model.embed_tokens.weight" and not is_tied:
                continue
            step += num_elements
            products += num_elements if len(shape) == 2 else 0
        config = checkpoint.hf_config
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        num_kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        return ModelSize(step, products, 2 * config["num_hidden_layers"] * num_kv_heads * head_dim)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the machine reached: bytes read a second, and floating-point operations a second."""

    bytes_per_second: float
    flops_per_second: float

    def best(self, other: Ceilings) -> Ceilings:
        """The higher of each."""
        return Ceilings(
            max(self.bytes_per_second, other.bytes_per_second),
            max(self.flops_per_second, other.flops_per_second),
        )


@dataclass(frozen=True, slots=True)
class StepFloor:
    """The floor of one decode step. A step can be faster than neither of its two times."""

    num_bytes: int
    read_ms: float
    num_flops: int
    compute_ms: float


def step_floor(
    size: ModelSize, ceilings: Ceilings, *, num_rows: int, context_len: float, bytes_per_element: int
) -> StepFloor:
    """The floor of a step of `num_rows` sequences whose contexts hold `context_len` tokens each."""
    num_elements = size.num_step_weights + num_rows * context_len * size.num_kv_elements
    num_bytes = round(num_elements * bytes_per_element)
    num_flops = 2 * num_rows * size.num_product_weights
    return StepFloor(
        num_bytes=num_bytes,
        read_ms=1000 * num_bytes / ceilings.bytes_per_second,
        num_flops=num_flops,
        compute_ms=1000 * num_flops / ceilings.flops_per_second,
    )


def measure_ceilings(num_threads: int) -> Ceilings:
    """The best of several float32 sums and matrix-vector products over 512 MiB, and of square products."""
    import torch

    torch.set_num_threads(num_threads)
    matrix = torch.ones(2**14, 2**13)  # [rows, columns] float32, 512 MiB: far more than any cache
    vector = torch.ones(2**13)
    square = torch.ones(1536, 1536)
    reading = min(_best_seconds(matrix.sum), _best_seconds(lambda: matrix @ vector))
    multiplying = _best_seconds(lambda: square @ square)
    num_bytes = matrix.numel() * matrix.element_size()
    return Ceilings(num_bytes / reading, 2 * square.shape[0] ** 3 / multiplying)


def _best_seconds(run: Callable[[], Any], *, repeats: int = 6) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> int:
    """Answer "size" and "ceilings", one JSON line each, until standard input ends."""
    parser = argparse.ArgumentParser(description="A model's size and a machine's ceilings, in JSON lines.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()

    from graphllm.models.checkpoint import open_checkpoint, resolve_model_path

    checkpoint = open_checkpoint(resolve_model_path(arguments.model))
    print(json.dumps(asdict(ModelSize.of(checkpoint))), flush=True)
    for _ in sys.stdin:
        print(json.dumps(asdict(measure_ceilings(arguments.threads))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
