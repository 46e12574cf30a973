"""GGUF files whose matrices stay packed compute what their expanded numbers do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

from graphllm.attention.paged import PagedAttention
from graphllm.errors import CheckpointError, ConfigError
from graphllm.kernels.linear import linear_ref
from graphllm.models.checkpoint import Checkpoint, open_checkpoint
from graphllm.models.decoder import Decoder
from graphllm.models.dummy import DummyCheckpoint
from graphllm.models.quantization import read_quantization
from graphllm.models.registry import find_family, read_model_config
from graphllm.models.weights import load_model
from graphllm.quant.gguf import GgufRows
from graphllm.quant.unquantized import Unquantized
from graphllm.runner.memory_estimate import weight_bytes
from tests.models.equality import TOLERANCE, error, prompt
from tests.models.paged_model import BLOCK_SIZE, PagedModel
from tests.models.small_gguf import small_tensors, write_small_llama
from tests.models.test_gguf_families import CASES, written
from tests.models.test_packed_checkpoints import configured_llama, exact_products, schemes

__all__ = ["exact_products"]
Q4_0, Q4_1, Q8_0 = (GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q8_0"))


def load(checkpoint: Checkpoint | DummyCheckpoint, quantization: str | None) -> tuple[Decoder, torch.Tensor]:
    """The decoder, and its logits of a prompt."""
    backend = PagedAttention(block_size=BLOCK_SIZE)
    model = load_model(
        checkpoint,
        backend=backend,
        device=torch.device("cpu"),
        dtype=torch.float32,
        product=linear_ref,
        quantization=quantization,
    )
    return model, PagedModel(model, backend).step([(0, prompt(40))])


def plain_layers(model: Decoder) -> set[str]:
    """Paths of the layers that are not packed."""
    return {path for path, scheme in schemes(model).items() if isinstance(scheme, Unquantized)}


@pytest.mark.parametrize(
    ("architecture", "keys", "kind"),
    [
        ("llama", {"hidden_size": 64, "intermediate_size": 96}, Q4_0),
        ("qwen3moe", {"hidden_size": 64, "moe_intermediate_size": 32}, Q8_0),
        ("deepseek2", {"hidden_size": 64, "kv_lora_rank": 32}, Q4_1),
    ],
)
def test_packed_and_expanded_are_equal(
    tmp_path: Path, architecture: str, keys: dict[str, Any], kind: GGMLQuantizationType
) -> None:
    """Rows of heads in another order, experts of one tensor, and layers that need plain numbers."""
    case = next(case for case in CASES if case.architecture == architecture)
    checkpoint = written(
        tmp_path, case, case.family.tiny(case.variant, **{**case.keys, **keys}), tensor_type=kind
    )
    model, found = load(checkpoint, "gguf")
    assert error(found, load(checkpoint, None)[1]) < TOLERANCE
    assert any(isinstance(scheme, GgufRows) for scheme in schemes(model).values())


def test_products_of_several_types_are_expanded_and_no_others(tmp_path: Path) -> None:
    path = write_small_llama(
        tmp_path / "m.gguf", tensor_type=Q4_0, types={"blk.1.attn_v": Q8_0, "down": Q8_0}
    )
    model, found = load(open_checkpoint(path), "gguf")
    assert error(found, load(open_checkpoint(path), None)[1]) < TOLERANCE
    assert plain_layers(model) == {"layers.1.attention.qkv", "head"}
    quantization = read_quantization(open_checkpoint(path), asked="gguf")
    assert quantization.description == "GGUF Q4_0, GGUF Q8_0"


def test_a_head_of_its_own_stays_packed_and_the_embedding_does_not(tmp_path: Path) -> None:
    tensors = small_tensors(tied=False)
    path = write_small_llama(tmp_path / "m.gguf", tensor_type=Q8_0, tensors=tensors)
    model, found = load(open_checkpoint(path), "gguf")
    assert error(found, load(open_checkpoint(path), None)[1]) < TOLERANCE
    assert plain_layers(model) == set() and model.embedding.weight.dtype == torch.float32


def test_by_default_files_are_expanded(tmp_path: Path) -> None:
    path = write_small_llama(tmp_path / "m.gguf", tensor_type=Q8_0)
    assert all(
        isinstance(scheme, Unquantized) for scheme in schemes(load(open_checkpoint(path), None)[0]).values()
    )
    with pytest.raises(ConfigError, match=r"--quantization gguf: .* is not stored so"):
        read_quantization(configured_llama(), asked="gguf")


def test_a_files_memory_is_foreseen_and_filled_at_random(tmp_path: Path) -> None:
    path = write_small_llama(tmp_path / "m.gguf", tensor_type=Q4_0, types={"blk.1.attn_v": Q8_0})
    checkpoint = DummyCheckpoint(path)
    model, logits = load(checkpoint, "gguf")
    assert logits.isfinite().all() and plain_layers(model) == {"layers.1.attention.qkv", "head"}
    config = read_model_config(checkpoint, find_family(checkpoint))
    foreseen = weight_bytes(config, torch.float32, quantization=read_quantization(checkpoint, asked="gguf"))
    assert foreseen.total == sum(parameter.nbytes for parameter in model.parameters())


def test_scales_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    path = write_small_llama(tmp_path / "m.gguf", tensor_type=Q8_0)
    data, marker = bytearray(path.read_bytes()), open_checkpoint(path)
    blocks = marker.tensor("model.layers.1.mlp.down_proj.weight")  # the file's last tensor
    num_bytes = blocks.numel() // 32 * 34
    data[-num_bytes : 2 - num_bytes] = b"\x00\x7e"  # NaN in float16
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"'model.layers.1.mlp.down_proj.scales': .* not all finite"):
        load(open_checkpoint(path), "gguf")
