"""What our int8 and int4 cost and bring on a CPU: perplexity, and the time of a decode step, beside float32.

    python -m benchmarks.quantized_weights [--models demo gemma3] [--num-windows N] [--output]

The models and the text are those of `benchmarks.real_weights`. Perplexity is taken in windows of 1,024
tokens, so it is that of products with many rows; `tests/quant` has products of few rows and of many say the
same. Decode steps of the three formats take turns, and the fastest of each counts: a busy neighbour only ever
adds time. A step is the whole model at a context of 128 tokens, its head included, which is tied to the
embedding in both models and stays as it is: the share of it is printed. No sampling, no server.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.kv_quality import BLOCK_SIZE, CPU, token_losses
from benchmarks.real_weights import MODELS, token_windows
from graphllm.arena import Arena
from graphllm.attention.backend import AttentionBucket, AttentionInputs, GroupInputs
from graphllm.attention.paged import PagedAttention
from graphllm.cache.kv_cache import KVCache
from graphllm.kernels.linear import LinearProduct, give_threads, linear_ref
from graphllm.models.checkpoint import Checkpoint, open_checkpoint
from graphllm.models.decoder import Decoder
from graphllm.models.demo import demo_model_path
from graphllm.models.quantization import read_quantization
from graphllm.models.registry import find_family, read_model_config
from graphllm.models.weights import choose_product, load_model

RESULTS = Path(__file__).resolve().parent / "results" / "quantized_weights.jsonl"
FORMATS = ("float32", "int8", "int4")
NUM_WINDOWS = 4
CONTEXT = 128
ROWS = (1, 8)
ROUNDS = 12
# The limits of what quantization may cost, in percent of float32's perplexity.
MAX_RISE_PERCENT = {("demo", "int8"): 0.5, ("demo", "int4"): 0.5, ("gemma3", "int4"): 8.0}
# How long idle threads of the library before may go on spinning.
_SPIN_SECONDS = 0.03


@dataclass(frozen=True, slots=True)
class Subject:
    """A model in one format. product: of its plain weights, whose library has the threads."""

    model: Decoder
    product: LinearProduct
    load_seconds: float

    @property
    def layer_bytes(self) -> int:
        """What a step reads of the layers' weights."""
        return sum(values.nbytes for values in self.model.layers.parameters())

    @property
    def head_bytes(self) -> int:
        """What a step reads of the head, which is the embedding's matrix."""
        return self.model.embedding.weight.nbytes


def load(checkpoint: Checkpoint, name: str) -> Subject:
    """The checkpoint's model with its layers in the format `name`; head and embedding stay in float32."""
    started = time.monotonic()
    asked = None if name == "float32" else name
    config = read_model_config(checkpoint, find_family(checkpoint))
    stored = read_quantization(checkpoint, asked=asked)
    product = choose_product(config, device=CPU, dtype=torch.float32, quantization=stored)
    backend = PagedAttention(block_size=BLOCK_SIZE)
    model = load_model(
        checkpoint, backend=backend, device=CPU, dtype=torch.float32, product=product, quantization=asked
    )
    return Subject(model, product, time.monotonic() - started)


def decode_step(model: Decoder, num_rows: int) -> Callable[[], None]:
    """One step of `num_rows` sequences with CONTEXT tokens behind each, ready to be run again and again."""
    config = model.config
    blocks_per_row = CONTEXT // BLOCK_SIZE + 1
    shape = config.kv_cache_shape(block_size=BLOCK_SIZE, dtype=torch.float32)
    kv_cache = KVCache(shape, num_rows * blocks_per_row + 1, device=CPU)
    block_tables = torch.arange(1, num_rows * blocks_per_row + 1, dtype=torch.int32).view(num_rows, -1)
    positions = torch.full((num_rows,), CONTEXT)
    inputs = AttentionInputs(
        row_slots=torch.arange(num_rows),
        query_lens=torch.ones(num_rows, dtype=torch.int64),
        context_lens=positions + 1,
        query_starts=torch.arange(num_rows + 1),
        positions=positions,
        groups=(
            GroupInputs(
                slot_mapping=block_tables[:, -1].long() * BLOCK_SIZE,
                block_tables=block_tables,
            ),
        ),
    )
    metadata = model.backend.plan(inputs, AttentionBucket(num_rows, num_rows, num_rows))
    model.backend.begin_step(metadata)
    arena, rows = Arena(CPU), torch.arange(num_rows)
    token_ids, logits = torch.full((num_rows,), 5), torch.empty(num_rows, config.vocab_size)

    @torch.inference_mode()
    def step() -> None:
        model(
            token_ids,
            positions,
            layer_caches=kv_cache.layers,
            metadata=metadata,
            arena=arena,
            sampled_tokens=rows,
            logits=logits,
        )

    return step


def step_milliseconds(subjects: dict[str, Subject], num_rows: int) -> dict[str, float]:
    """The fastest step of each subject, which take turns."""
    num_threads = torch.get_num_threads()
    steps = {name: decode_step(subject.model, num_rows) for name, subject in subjects.items()}
    best = dict.fromkeys(subjects, math.inf)
    for _ in range(ROUNDS):
        for name, step in steps.items():
            give_threads(subjects[name].product, num_threads)
            time.sleep(_SPIN_SECONDS)
            step()
            for _ in range(3):
                began = time.perf_counter()
                step()
                best[name] = min(best[name], 1e3 * (time.perf_counter() - began))
    give_threads(linear_ref, num_threads)
    return best


def measure(path: Path, *, num_windows: int) -> dict[str, dict[str, Any]]:
    """Of each format: load_seconds, layer_megabytes, head_megabytes, perplexity, rise_percent, and
    step_milliseconds by rows."""
    checkpoint, num_threads = open_checkpoint(path), torch.get_num_threads()
    windows = token_windows(checkpoint.load_tokenizer(), num_windows)
    subjects = {}
    for name in FORMATS:
        give_threads(linear_ref, num_threads)
        subjects[name] = load(checkpoint, name)
        gc.collect()
    give_threads(linear_ref, num_threads)
    found: dict[str, dict[str, Any]] = {}
    for name, subject in subjects.items():
        losses = [token_losses(subject.model, torch.float32, window) for window in windows]
        perplexity = math.exp(torch.cat(losses).double().mean().item())
        base = found["float32"]["perplexity"] if found else perplexity
        found[name] = {
            "load_seconds": round(subject.load_seconds, 2),
            "layer_megabytes": round(subject.layer_bytes / 1e6, 1),
            "head_megabytes": round(subject.head_bytes / 1e6, 1),
            "perplexity": round(perplexity, 5),
            "rise_percent": round(100 * (perplexity / base - 1), 4),
            "step_milliseconds": {},
        }
    for rows in ROWS:
        for name, milliseconds in step_milliseconds(subjects, rows).items():
            found[name]["step_milliseconds"][rows] = round(milliseconds, 2)
    return found


def complaints(model: str, found: dict[str, dict[str, Any]]) -> list[str]:
    """What is above the limits."""
    wrong = [
        f"{model} in {name}: perplexity rises by {found[name]['rise_percent']} %, the limit is {limit} %"
        for (subject, name), limit in MAX_RISE_PERCENT.items()
        if subject == model and found[name]["rise_percent"] > limit
    ]
    one_row = {name: found[name]["step_milliseconds"][1] for name in FORMATS}
    if one_row["int8"] >= one_row["float32"]:
        wrong.append(f"{model}: int8 takes {one_row['int8']} ms a step, float32 {one_row['float32']} ms")
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each model and format; 1 where a limit is passed.

    `--output` appends each model's line to `results/quantized_weights.jsonl`.
    """
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--num-windows", type=int, default=NUM_WINDOWS)
    parser.add_argument("--output", action="store_true")
    options = parser.parse_args(argv)
    wrong: list[str] = []
    for model in options.models:
        source = MODELS[model]
        found = measure(demo_model_path(source), num_windows=options.num_windows)
        for name, numbers in found.items():
            steps = ", ".join(
                f"{milliseconds} ms at {rows}" for rows, milliseconds in numbers["step_milliseconds"].items()
            )
            print(
                f"{model:>8} {name:>7}: perplexity {numbers['perplexity']:.4f} "
                f"({numbers['rise_percent']:+.3f} %); step {steps}; layers {numbers['layer_megabytes']} MB, "
                f"head {numbers['head_megabytes']} MB; loaded in {numbers['load_seconds']} s",
                flush=True,
            )
        wrong += complaints(model, found)
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "benchmark": "quantized_weights",
            "model": model,
            "sha256": source.sha256,
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "num_threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "context": CONTEXT,
            "formats": found,
        }
        if options.output:
            with RESULTS.open("a", encoding="utf-8") as results:
                results.write(json.dumps(line) + "\n")
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
