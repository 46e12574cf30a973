"""What 8-bit KV costs: the demo model's perplexity on a fixed text, by number format of the KV cache.

    python -m benchmarks.kv_quality [--num-windows N] [--output]

The text is `benchmarks/texts/house_docs.txt`, prose about this program as it once was; it never changes, so
that results compare. It is read in windows of 1,024 tokens, each from an empty cache. Attention reads every
key and value from the cache, a window's own too, so that each token is predicted from what the cache made of
all tokens before it. Everything but the cache is float32. Owns the measurement; the limits are the
test's and the issue's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphllm.arena import Arena
from graphllm.attention.backend import AttentionBackend, AttentionBucket, AttentionInputs, GroupInputs
from graphllm.attention.paged import PagedAttention
from graphllm.cache.kv_cache import KVCache, KVCacheShape
from graphllm.config import DEMO_MODEL
from graphllm.models.checkpoint import open_checkpoint, resolve_model_path
from graphllm.models.decoder import Decoder
from graphllm.models.weights import load_model
from graphllm.tokenizer.tokenizer import Tokenizer

TEXT = Path(__file__).resolve().parent / "texts" / "house_docs.txt"
RESULTS = Path(__file__).resolve().parent / "results" / "kv_quality.jsonl"
WINDOW = 1024
NUM_WINDOWS = 8
CHUNK = 256
BLOCK_SIZE = 16
CPU = torch.device("cpu")
FORMATS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
}


@dataclass(frozen=True, slots=True)
class Subject:
    """A model whose attention is `backend`'s, and its tokenizer."""

    model: Decoder
    tokenizer: Tokenizer


def demo_subject(backend: AttentionBackend | None = None) -> Subject:
    """The demo model in float32."""
    checkpoint = open_checkpoint(resolve_model_path(DEMO_MODEL))
    backend = backend or PagedAttention(block_size=BLOCK_SIZE)
    model = load_model(checkpoint, backend=backend, device=CPU, dtype=torch.float32)
    return Subject(model, checkpoint.load_tokenizer())


def text_tokens(tokenizer: Tokenizer, num_tokens: int) -> list[int]:
    """The first tokens of the text."""
    token_ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)
    assert len(token_ids) >= num_tokens, f"the text has {len(token_ids)} tokens"
    return token_ids[:num_tokens]


@torch.inference_mode()
def token_losses(model: Decoder, kv_dtype: torch.dtype, token_ids: Sequence[int]) -> torch.Tensor:
    """-log p of each token but the first, given those before it: [len(token_ids) - 1] float32."""
    config = model.config
    num_blocks = -(-len(token_ids) // BLOCK_SIZE)
    shape = KVCacheShape(config.num_layers, config.num_kv_heads, config.head_dim, BLOCK_SIZE, kv_dtype)
    kv_cache = KVCache(shape, num_blocks + 1, device=CPU)
    block_tables = torch.arange(1, num_blocks + 1, dtype=torch.int32)[None]
    arena = Arena(CPU)
    losses = []
    targets = torch.tensor(token_ids[1:])
    for start in range(0, len(targets), CHUNK):
        positions = torch.arange(start, min(start + CHUNK, len(targets)))
        count = len(positions)
        inputs = AttentionInputs(
            row_slots=torch.tensor([0]),
            query_lens=torch.tensor([count]),
            context_lens=torch.tensor([start + count]),
            query_starts=torch.tensor([0, count]),
            positions=positions,
            groups=(GroupInputs(slot_mapping=BLOCK_SIZE + positions, block_tables=block_tables),),
        )
        metadata = model.backend.plan(inputs, AttentionBucket(count, 1, 0))
        model.backend.begin_step(metadata)
        logits = torch.empty(count, config.vocab_size)
        model(
            torch.tensor(token_ids[start : start + count]),
            positions,
            layer_caches=kv_cache.layers,
            metadata=metadata,
            arena=arena,
            sampled_tokens=torch.arange(count),
            logits=logits,
        )
        losses.append(torch.nn.functional.cross_entropy(logits, targets[positions], reduction="none"))
    return torch.cat(losses)


def perplexity(subject: Subject, kv_dtype: torch.dtype, *, num_windows: int, window: int = WINDOW) -> float:
    """exp of the mean loss over all windows' tokens."""
    token_ids = text_tokens(subject.tokenizer, num_windows * window)
    losses = [
        token_losses(subject.model, kv_dtype, token_ids[first : first + window])
        for first in range(0, len(token_ids), window)
    ]
    return math.exp(torch.cat(losses).double().mean().item())


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each format; `--output` appends the run to `results/kv_quality.jsonl`."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-windows", type=int, default=NUM_WINDOWS)
    parser.add_argument("--output", action="store_true")
    options = parser.parse_args(argv)
    subject = demo_subject()
    line: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "benchmark": "kv_quality",
        "model": DEMO_MODEL,
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "torch": torch.__version__,
        "num_tokens": options.num_windows * (WINDOW - 1),
        "perplexity": {},
        "rise_percent": {},
    }
    for name, dtype in FORMATS.items():
        value = perplexity(subject, dtype, num_windows=options.num_windows)
        line["perplexity"][name] = round(value, 5)
        rise = 100 * (value / line["perplexity"]["float32"] - 1)
        line["rise_percent"][name] = round(rise, 4)
        print(f"{name:>10}: perplexity {value:.4f}, {rise:+.3f} %", flush=True)
    if options.output:
        with RESULTS.open("a", encoding="utf-8") as results:
            results.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
