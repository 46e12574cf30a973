"""Static KV scales in a checkpoint are refused by name: they are neither honoured nor ignored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graphllm.cli import EXIT_STARTUP_ERROR, main
from tests.tiny_model import write_tiny_model


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_a_checkpoint_with_static_scales_is_refused_by_their_name(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors[f"model.layers.0.self_attn.{name}"] = torch.tensor(0.5)
    save_file(tensors, weights, metadata={"format": "pt"})
    arguments = ["--model", str(folder), "--kv-cache-dtype", "fp8", "--device", "cpu", "--port", "0"]
    assert main(arguments) == EXIT_STARTUP_ERROR
    assert f"model.layers.0.self_attn.{name}" in capsys.readouterr().err
