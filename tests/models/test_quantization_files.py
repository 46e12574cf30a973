"""Packed checkpoints in folders as quantizers leave them: files of their own, shards, and types of 8 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from graphllm.errors import CheckpointError
from graphllm.models.checkpoint import open_checkpoint
from graphllm.models.dummy import DummyCheckpoint
from graphllm.models.quantization import read_quantization
from tests.models.equality import TOLERANCE, error
from tests.models.memory_checkpoint import MemoryCheckpoint, as_checkpoint, tiny_llama
from tests.models.packers import packed
from tests.models.test_packed_checkpoints import AWQ, CASES, GPTQ, SIZES, exact_products, load, logits
from tests.quant.scaled_models import quantized
from tests.quant.test_scaled_checkpoints import CASES as SCALED
from tests.quant.test_scaled_checkpoints import SHAPE

__all__ = ["exact_products"]

# As the quantizers' own files spell it, which name no method.
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "quantize_config.json": (
        "GPTQ",
        {
            "bits": 4,
            "group_size": 32,
            "damp_percent": 0.1,
            "desc_act": False,
            "static_groups": False,
            "sym": True,
            "true_sequential": True,
            "model_name_or_path": None,
            "model_file_base_name": "model",
            "is_marlin_format": False,
        },
    ),
    "quant_config.json": ("AWQ", {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}),
}


def write(
    folder: Path, checkpoint: MemoryCheckpoint, *, num_shards: int = 1, **files: dict[str, Any]
) -> Path:
    """A folder of the checkpoint. A module's tensors lie in different shards where there are several."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(checkpoint.hf_config, default=str))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    weight_map, names = {}, sorted(checkpoint.tensors)
    for index in range(num_shards):
        file = (
            "model.safetensors" if num_shards == 1 else f"model-{index + 1:05}-of-{num_shards:05}.safetensors"
        )
        shard = {name: checkpoint.tensors[name].contiguous() for name in names[index::num_shards]}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if num_shards > 1:
        index_file = folder / "model.safetensors.index.json"
        index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def packed_by(name: str) -> tuple[MemoryCheckpoint, MemoryCheckpoint]:
    """(packed, plain), of a configuration that says nothing of how weights are stored."""
    stored, plain = packed(as_checkpoint(tiny_llama(**SIZES)), CASES[name].packer, config={})
    del stored.hf_config["quantization_config"]
    return stored, plain


@pytest.mark.parametrize("file", FILES)
def test_what_a_quantizers_own_file_says_is_read_where_config_json_is_silent(
    file: str, tmp_path: Path
) -> None:
    name, content = FILES[file]
    stored, plain = packed_by(name)
    folder = write(tmp_path / "model", stored, num_shards=3, **{file: content})
    checkpoint = open_checkpoint(folder)
    assert error(logits(checkpoint), logits(plain)) < TOLERANCE
    found = read_quantization(checkpoint, asked=None)
    assert found.method == name.lower() and found.description.startswith(f"{name}, 4 bits in groups of 32")
    assert read_quantization(DummyCheckpoint(folder), asked=None).description == found.description


def test_config_json_counts_more_than_another_file(tmp_path: Path) -> None:
    stored, _ = packed(as_checkpoint(tiny_llama(**SIZES)), CASES["GPTQ"].packer, config=GPTQ)
    folder = write(tmp_path / "model", stored, **{"quantize_config.json": {"bits": 3}})
    assert read_quantization(open_checkpoint(folder), asked=None).description.startswith("GPTQ, 4 bits")


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("quantize_config.json", {"bits": 3}, "'quantize_config.json.bits' is 3; only 4 and 8"),
        ("quantize_config.json", {"group_size": 64}, "q_proj.qzeros' has shape"),
        ("quantize_config.json", {"quant_method": "quip"}, "'quantize_config.json.quant_method' is 'quip'"),
        ("quantize_config.json", {"is_marlin_format": True}, "is_marlin_format' is True"),
        ("quantize_config.json", [1, 2], "quantize_config.json: it is not a JSON object"),
        ("quant_config.json", {"version": "GEMV"}, "'quant_config.json.version' is 'GEMV'"),
        ("quant_config.json", None, "quant_config.json: it is not a JSON object"),
    ],
)
def test_such_a_file_is_refused_by_its_name(file: str, content: Any, complaint: str, tmp_path: Path) -> None:
    name, whole = FILES[file]
    stored, _ = packed_by(name)
    damaged = whole | content if isinstance(content, dict) else content
    folder = write(tmp_path / "model", stored, **{file: damaged})
    with pytest.raises(CheckpointError, match=complaint):
        load(open_checkpoint(folder))


def test_packed_tensors_of_which_nothing_is_said_are_refused(tmp_path: Path) -> None:
    stored, _ = packed_by("AWQ")
    with pytest.raises(CheckpointError, match=r"'model.layers.0.mlp.down_proj.weight'.* missing"):
        load(open_checkpoint(write(tmp_path / "model", stored)))


def test_keys_of_both_generations_may_not_contradict_each_other() -> None:
    both = as_checkpoint(tiny_llama(**SIZES))
    both.hf_config |= {"quantization_config": GPTQ, "compression_config": dict(GPTQ)}
    assert read_quantization(both, asked=None).method == "gptq"
    both.hf_config["compression_config"] = AWQ
    with pytest.raises(CheckpointError, match="'compression_config' contradicts 'quantization_config'"):
        read_quantization(both, asked=None)


def test_scales_of_powers_of_two_are_read_from_a_file(tmp_path: Path) -> None:
    """DeepSeek's form of blocks: float8_e8m0fnu, which is the exponent and nothing else."""
    quantizer, config, activations = SCALED["fp8, blocks"]
    checkpoint, _ = quantized(tiny_llama(**SHAPE), quantizer, config | {"scale_fmt": "ue8m0"}, **activations)
    in_float32 = MemoryCheckpoint(checkpoint.hf_config, dict(checkpoint.tensors))
    for name in [name for name in checkpoint.tensors if name.endswith("_scale_inv")]:
        powers = checkpoint.tensors[name].log2().round().exp2()
        in_float32.tensors[name] = powers
        checkpoint.tensors[name] = powers.to(torch.float8_e8m0fnu)
    folder = write(tmp_path / "model", checkpoint, num_shards=2)
    assert torch.equal(logits(open_checkpoint(folder)), logits(in_float32))
