"""The peer computes what the checkpoint says: transformers' own loading of a folder is the oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from benchmarks.peers.transformers_generate import load_model
from benchmarks.step_floor import ModelSize
from graphllm.models.checkpoint import open_checkpoint
from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("peer") / "model")


def test_the_peer_s_logits_are_those_of_transformers_own_loading(folder: Path) -> None:
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = torch.arange(40, 80).unsqueeze(0)  # [1, 40] int64
    with torch.inference_mode():
        logits = load_model(open_checkpoint(folder))(tokens).logits
        assert torch.equal(logits, expected(tokens).logits)


def test_the_peer_attends_eagerly_in_float32(folder: Path) -> None:
    model = load_model(open_checkpoint(folder))
    assert model.config._attn_implementation == "eager"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_model_s_size_is_counted_from_its_checkpoint(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    all_weights = sum(checkpoint.tensor(name).numel() for name in checkpoint.tensor_names())
    embedding = checkpoint.tensor("model.embed_tokens.weight").numel()
    size = ModelSize.of(checkpoint)
    assert size.num_step_weights == all_weights - embedding
    assert size.num_kv_elements == 2 * 2 * 2 * 16
