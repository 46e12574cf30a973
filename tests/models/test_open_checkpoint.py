"""Which source of weights a path is, and what `--model` may say."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from graphllm.errors import CheckpointError
from graphllm.models.checkpoint import Checkpoint, open_checkpoint, resolve_model_path
from graphllm.models.demo import DEMO_WHEEL_MODEL
from graphllm.models.gguf import GGUFCheckpoint
from graphllm.models.safetensors_folder import FolderCheckpoint
from tests.models.small_gguf import write_small_llama


def write_folder(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    save_file({"model.norm.weight": torch.ones(4)}, path / "model.safetensors")
    return path


def test_folder_and_gguf_file_are_told_apart(tmp_path: Path) -> None:
    folder: Checkpoint = open_checkpoint(write_folder(tmp_path / "folder.gguf"))
    assert isinstance(folder, FolderCheckpoint)
    file: Checkpoint = open_checkpoint(write_small_llama(tmp_path / "m.gguf"))
    assert isinstance(file, GGUFCheckpoint)
    for checkpoint in (folder, file):
        assert checkpoint.hf_config["architectures"] == ["LlamaForCausalLM"]
        assert checkpoint.tensor("model.norm.weight").shape == checkpoint.tensor_shape("model.norm.weight")
    assert (folder.path, file.path) == (tmp_path / "folder.gguf", tmp_path / "m.gguf")


def test_gguf_file_is_known_by_its_content_when_its_name_does_not_say(tmp_path: Path) -> None:
    path = write_small_llama(tmp_path / "m.gguf").rename(tmp_path / hashlib.sha256(b"").hexdigest())
    assert isinstance(open_checkpoint(path), GGUFCheckpoint)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing", None, "no such file or folder"),
        ("m.gguf", b"not one", "not a GGUF file"),
        ("model.safetensors", b"x", "give the folder that holds it"),
        ("model.bin", b"x", "neither a folder in Hugging Face layout nor a GGUF file"),
        ("empty", b"", "neither a folder in Hugging Face layout nor a GGUF file"),
    ],
)
def test_other_paths_are_refused_by_name(
    tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / name)
    assert caught.value.message.startswith(f"{tmp_path / name}: ")
    assert reason in caught.value.message


def test_local_path_resolves_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "org")
    (folder / "repo").mkdir()
    assert resolve_model_path(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve_model_path("org/repo") == Path("org/repo")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model_path("~/org") == folder


def test_a_mistyped_path_is_told_what_a_model_may_be(tmp_path: Path) -> None:
    for name in (
        str(tmp_path / "missing"),
        "./missing",
        "missing",
        "a/b/c",
        "models/m.gguf",
        "x" * 5000,
        "a\0b",
    ):
        with pytest.raises(CheckpointError) as caught:
            resolve_model_path(name)
        assert caught.value.message.startswith(f"{name}: no such file or folder, and not a repository on")
        assert "org/name@revision" in caught.value.message


def test_demo_means_the_demo_model_even_beside_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAPHLLM_CACHE", str(tmp_path / "demo"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(CheckpointError, match="The demo model cannot be fetched"):
        resolve_model_path("demo")
    path = tmp_path / "demo" / DEMO_WHEEL_MODEL.file_name
    with path.open("wb") as file:
        file.truncate(DEMO_WHEEL_MODEL.size)
    note = f"{DEMO_WHEEL_MODEL.sha256} {path.stat().st_mtime_ns}\n"
    path.with_name(f"{path.name}.verified").write_text(note)  # as if checked before
    assert resolve_model_path("demo") == path
    assert resolve_model_path("./demo") == Path("demo")
