"""Random weights: from a configuration alone to a model that computes, the same every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graphllm.attention.paged import PagedAttention
from graphllm.errors import CheckpointError
from graphllm.kernels.linear import linear_ref
from graphllm.layers.norm import RMSNorm
from graphllm.models.checkpoint import open_checkpoint, open_model, resolve_model_path
from graphllm.models.decoder import Decoder
from graphllm.models.dummy import STANDARD_DEVIATION, DummyCheckpoint, fill_random
from graphllm.models.safetensors_folder import FolderCheckpoint
from graphllm.models.weights import load_model
from tests.models.equality import paged
from tests.models.families import GEMMA3
from tests.models.paged_model import BLOCK_SIZE, PagedModel
from tests.models.small_gguf import write_small_llama
from tests.tiny_model import write_tiny_model

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": True,
    "head_dim": 16,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": 400,
}


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "qwen3-tiny.json"
    path.write_text(json.dumps(CONFIG))
    return path


def load(path: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    backend = PagedAttention(block_size=BLOCK_SIZE)
    checkpoint = open_model(path, "dummy")
    return load_model(
        checkpoint, backend=backend, device=torch.device("cpu"), dtype=dtype, product=linear_ref
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_normal_and_norms_are_one(config_file: Path, dtype: torch.dtype) -> None:
    model = load(config_file, dtype)
    norms = {name for name, _ in model.named_parameters() if "norm" in name}
    assert len(norms) == 2 * 4 + 1
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert not parameter.requires_grad
        values = parameter.float()
        if name in norms:
            assert (values == 1.0).all(), name
        else:
            # Within five standard errors.
            slack = 5 * STANDARD_DEVIATION / values.numel() ** 0.5
            assert abs(float(values.mean())) < slack, name
            assert abs(float(values.std()) - STANDARD_DEVIATION) < slack, name


def test_norms_that_multiply_by_one_more_than_their_weight_multiply_by_1_too() -> None:
    model = paged(GEMMA3.tiny("two bases")).model
    fill_random(model, seed=0)
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    assert len(norms) == 2 * 6 + 1 and all((norm.weight == 0.0).all() for norm in norms)


def test_the_same_configuration_gives_the_same_weights(config_file: Path) -> None:
    first, second = load(config_file), load(config_file)
    for (name, parameter), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    fill_random(second, seed=1)
    assert not torch.equal(first.embedding.weight, second.embedding.weight)


def test_no_two_layers_are_alike(config_file: Path) -> None:
    first, second = load(config_file).layers
    assert not torch.equal(first.attention.qkv.weight, second.attention.qkv.weight)


def test_parameters_are_drawn_where_they_lie(config_file: Path) -> None:
    model = load(config_file)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    fill_random(model, seed=3)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


def test_a_random_model_computes_logits_of_a_sane_range(config_file: Path) -> None:
    model = load(config_file)
    backend = model.layers[0].attention.backend
    logits = PagedModel(model, backend).step([(0, list(range(40)))])
    assert logits.isfinite().all()
    assert 0.01 < float(logits.std()) < 10.0


def test_a_configuration_alone_comes_with_a_tokenizer_of_its_size(config_file: Path) -> None:
    checkpoint = open_model(resolve_model_path(str(config_file)), "dummy")
    assert isinstance(checkpoint, DummyCheckpoint)
    assert checkpoint.path == config_file
    assert checkpoint.hf_config == CONFIG
    assert checkpoint.load_tokenizer().vocab_size == 400


def test_a_folder_needs_no_more_than_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert DummyCheckpoint(tmp_path).load_tokenizer().vocab_size == 400
    assert load(tmp_path).config.vocab_size == 400


def test_a_folder_s_own_tokenizer_is_used(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    own = open_checkpoint(folder).load_tokenizer()
    found = DummyCheckpoint(folder).load_tokenizer()
    assert found.encode("Hello <|im_end|>") == own.encode("Hello <|im_end|>")
    assert found.eos_token_ids == own.eos_token_ids


def test_of_a_gguf_file_only_shapes_and_tokenizer_are_taken(tmp_path: Path) -> None:
    path = write_small_llama(tmp_path / "m.gguf")
    model, stored = load(path), open_checkpoint(path)
    name = "model.embed_tokens.weight"
    assert model.embedding.weight.shape == stored.tensor_shape(name)
    assert not torch.allclose(model.embedding.weight, stored.tensor(name))


def test_auto_reads_the_checkpoint(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    assert isinstance(open_model(folder, "auto"), FolderCheckpoint)


def test_a_configuration_without_weights_needs_the_flag(config_file: Path) -> None:
    with pytest.raises(CheckpointError, match="has no weights; --load-format dummy"):
        open_model(config_file, "auto")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("[1]", "not a JSON object"), ("{", "cannot|can be read"), ("{}", "'architectures'")],
)
def test_what_is_no_configuration_is_refused_by_name(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "model.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        load(path)
    assert str(path) in caught.value.message


def test_what_is_missing_is_refused_by_name(tmp_path: Path) -> None:
    for path, missing in ((tmp_path / "none", tmp_path / "none"), (tmp_path, tmp_path / "config.json")):
        with pytest.raises(CheckpointError, match="no such file") as caught:
            DummyCheckpoint(path)
        assert caught.value.message.startswith(f"{missing}: ")


@pytest.mark.parametrize("vocab_size", [None, "many", 97])
def test_a_vocabulary_that_no_tokenizer_fits_is_refused(tmp_path: Path, vocab_size: object) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(CONFIG | {"vocab_size": vocab_size}))
    with pytest.raises(CheckpointError, match="vocab") as caught:
        DummyCheckpoint(path).load_tokenizer()
    assert str(path) in caught.value.message
