"""Writes a random model of a real shape as a folder in Hugging Face layout.

    python -m benchmarks.gpu.checkpoint --shape llama-3.2-1b --output FOLDER

Owns the files: config.json, shards of safetensors with their index, and a byte-level tokenizer. The weights
are those of `weights.py`. What is written lies in the page cache, where the benchmark of start-up wants it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.gpu.floors import SHAPES
from benchmarks.gpu.weights import draw_weights, read_shape, weight_shapes

SCRATCH_VARIABLE = "GRAPHLLM_GPU_SCRATCH"
"""Names the environment variable with the folder that a run's checkpoints are shared in."""
_SHARD_BYTES = 4 << 30
_SPARE_BYTES = 2 << 30
_INDEX = "model.safetensors.index.json"


def scratch_checkpoint(shape: str) -> Path:
    """The folder of a shape's checkpoint, written if this run has none yet. Raises OSError without room."""
    named = os.environ.get(SCRATCH_VARIABLE)
    folder = Path(named) if named else Path(tempfile.gettempdir()) / "graphllm-gpu"
    target = folder / shape
    if not (target / _INDEX).exists():
        write_checkpoint(read_shape(shape), target, device=torch.device("cuda"))
    return target


def write_checkpoint(config: dict[str, Any], folder: Path, *, device: torch.device) -> None:
    """Draw the weights on `device` and write them. The index comes last: a folder that has one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    num_bytes = sum(2 * torch.Size(shape).numel() for shape in weight_shapes(config).values())
    if shutil.disk_usage(folder).free < num_bytes + _SPARE_BYTES:
        raise OSError(f"{folder} has no room for a checkpoint of {num_bytes / 2**30:.1f} GiB")
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    write_tokenizer(config["vocab_size"], folder)
    shard: dict[str, torch.Tensor] = {}
    shard_of: dict[str, str] = {}
    num_shards = 0

    def write_shard() -> None:
        nonlocal num_shards
        num_shards += 1
        name = f"model-{num_shards:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        shard_of.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in draw_weights(config, device):
        shard[name] = tensor.cpu()
        if sum(t.numel() * t.element_size() for t in shard.values()) >= _SHARD_BYTES:
            write_shard()
    if shard:
        write_shard()
    index = {"metadata": {"total_size": num_bytes}, "weight_map": shard_of}
    (folder / _INDEX).write_text(json.dumps(index), encoding="utf-8")


def write_tokenizer(vocab_size: int, folder: Path) -> None:
    """A tokenizer of exactly so many tokens: the bytes, three special tokens, and words without a meaning."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocabulary = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for text in special:
        vocabulary[text] = len(vocabulary)
    for index in range(len(vocabulary), vocab_size):
        vocabulary[f"w{index}"] = index
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    settings = {"eos_token": special[0], "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, required=True, help="the model")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--device", default="cuda", help="where weights are drawn (cuda)")
    options = parser.parse_args(argv)
    write_checkpoint(read_shape(options.shape), options.output, device=torch.device(options.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
