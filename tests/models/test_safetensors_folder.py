"""A folder in Hugging Face layout is read as it is, and a damaged one is refused by name."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from graphllm.errors import CheckpointError
from graphllm.models.safetensors_folder import FolderCheckpoint

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4}
FIRST = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.full((2,), 0.5, dtype=torch.bfloat16)}
SECOND = {"c": torch.tensor([[1.0, -2.0]], dtype=torch.float16)}
FIRST_NAME, SECOND_NAME = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
WEIGHT_MAP = {"a": FIRST_NAME, "b": FIRST_NAME, "c": SECOND_NAME}


def write_single(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({**FIRST, **SECOND}, folder / "model.safetensors")
    return folder


def write_sharded(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(FIRST, folder / FIRST_NAME)
    save_file(SECOND, folder / SECOND_NAME)
    write_index(folder, WEIGHT_MAP)
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    content = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def safetensors_bytes(header: str | dict[str, Any], data: bytes = bytes(24)) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize("write", [write_single, write_sharded])
def test_tensors_come_as_they_were_stored(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    checkpoint = FolderCheckpoint(write(tmp_path / "model"))
    stored = {**FIRST, **SECOND}
    assert set(checkpoint.tensor_names()) == set(stored)
    for name, expected in stored.items():
        tensor = checkpoint.tensor(name)
        assert tensor.dtype == expected.dtype
        assert tensor.device.type == "cpu"
        assert checkpoint.tensor_shape(name) == tuple(expected.shape)
        assert torch.equal(tensor, expected)
    assert checkpoint.hf_config == CONFIG


def test_generation_config_is_read_when_there_is_one(tmp_path: Path) -> None:
    folder = write_single(tmp_path / "model")
    assert FolderCheckpoint(folder).generation_config == {}
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    assert FolderCheckpoint(folder).generation_config == {"temperature": 0.6}


def test_checkpoint_saved_by_transformers_reads_the_same(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()
    checkpoint = FolderCheckpoint(tmp_path / "model")
    state = model.state_dict()
    assert set(checkpoint.tensor_names()) == set(state)
    assert all(torch.equal(checkpoint.tensor(name), values) for name, values in state.items())
    assert checkpoint.hf_config["architectures"] == ["LlamaForCausalLM"]


def test_single_file_wins_over_an_index(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "model")
    save_file({"only": torch.ones(1)}, folder / "model.safetensors")
    assert list(FolderCheckpoint(folder).tensor_names()) == ["only"]


def test_folder_of_links_is_read_as_in_a_hub_cache(tmp_path: Path) -> None:
    blobs, folder = write_sharded(tmp_path / "blobs"), tmp_path / "snapshot"
    folder.mkdir()
    for blob in blobs.iterdir():
        (folder / blob.name).symlink_to(os.path.relpath(blob, folder))
    assert torch.equal(FolderCheckpoint(folder).tensor("c"), SECOND["c"])


def test_writing_into_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    folder = write_single(tmp_path / "model")
    FolderCheckpoint(folder).tensor("a").zero_()
    assert torch.equal(FolderCheckpoint(folder).tensor("a"), FIRST["a"])


def test_unknown_tensor_name_is_an_error_that_names_it(tmp_path: Path) -> None:
    checkpoint = FolderCheckpoint(write_single(tmp_path / "model"))
    for ask in (checkpoint.tensor, checkpoint.tensor_shape):
        with pytest.raises(CheckpointError, match=r"model: it has no tensor 'd'"):
            ask("d")


def test_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    checkpoint = FolderCheckpoint(write_single(tmp_path / "model"))
    with pytest.raises(CheckpointError, match=r"model/tokenizer\.json: no such file"):
        checkpoint.load_tokenizer()


def test_tokenizer_that_cannot_be_used_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    folder = write_single(tmp_path / "model")
    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"model: The tokenizer has no decoder"):
        FolderCheckpoint(folder).load_tokenizer()


def test_tokenizer_is_the_folder_s(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = write_single(tmp_path / "model")
    alphabet = {
        character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = FolderCheckpoint(folder).load_tokenizer()
    assert tokenizer.vocab_size == 256
    assert tokenizer.encode("ab", add_special_tokens=False) == [alphabet["a"], alphabet["b"]]


def test_missing_folder_and_a_file_in_its_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing: no such folder"):
        FolderCheckpoint(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file: is not a folder"):
        FolderCheckpoint(tmp_path / "file")


# Each damages a good folder of one kind: (which kind, what is done to it, the file named, the reason).

Damage = Callable[[Path], object]
ENTRY = {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}


def weights(data: bytes) -> Damage:
    return lambda folder: (folder / "model.safetensors").write_bytes(data)


def index_text(text: str) -> Damage:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


def weight_map(**changes: Any) -> Damage:
    return lambda folder: write_index(folder, {**WEIGHT_MAP, **changes})


def config(data: bytes) -> Damage:
    return lambda folder: (folder / "config.json").write_bytes(data)


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def cut(name: str, num_bytes: int) -> Damage:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - num_bytes)


def only_file(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(b"x")

    return damage


def folder_in_place_of(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


DAMAGED_SINGLE: dict[str, tuple[Damage, str, str]] = {
    "no config": (remove("config.json"), "config.json", "is missing"),
    "config not JSON": (config(b"{"), "config.json", "it is not valid JSON"),
    "config not text": (config(b"\xff\xfe"), "config.json", "it is not valid JSON"),
    "config not an object": (config(b"[1]"), "config.json", "it is not a JSON object"),
    "config empty": (config(b""), "config.json", "it is not valid JSON"),
    "config nested beyond measure": (config(b"[" * 200000), "config.json", "it is not valid JSON"),
    "config a folder": (folder_in_place_of("config.json"), "config.json", "is not a regular file"),
    "generation config not JSON": (
        lambda folder: (folder / "generation_config.json").write_text("none"),
        "generation_config.json",
        "it is not valid JSON",
    ),
    "no weights": (remove("model.safetensors"), "", "it has no weights: neither model.safetensors nor"),
    "weights a folder": (
        folder_in_place_of("model.safetensors"),
        "model.safetensors",
        "is not a regular file",
    ),
    "pytorch weights only": (
        only_file("pytorch_model.bin"),
        "",
        "weights only as pytorch_model.bin; convert",
    ),
    "shards without an index": (only_file(FIRST_NAME), "", f"it has {FIRST_NAME}, but neither"),
    "GGUF in the folder": (only_file("m.gguf"), "", "to serve m.gguf, give the path of that file"),
    "weights empty": (
        weights(b""),
        "model.safetensors",
        "truncated or damaged: 0 bytes cannot hold the header",
    ),
    "weights shorter than a header": (
        weights(bytes(7)),
        "model.safetensors",
        "truncated or damaged: 7 bytes",
    ),
    "weights cut in the header": (
        weights(safetensors_bytes({"x": ENTRY})[:30]),
        "model.safetensors",
        "truncated",
    ),
    "weights cut in the data": (
        cut("model.safetensors", 1),
        "model.safetensors",
        "truncated: its header announces 56 bytes of data, but 55 are there",
    ),
    "weights with bytes to spare": (
        weights(safetensors_bytes({"x": ENTRY}, bytes(25))),
        "model.safetensors",
        "cannot be read",
    ),
    "header of absurd length": (
        weights(b"\xff" * 100),
        "model.safetensors",
        "truncated or damaged: 100 bytes",
    ),
    "header not JSON": (
        weights(safetensors_bytes("{'x'}")),
        "model.safetensors",
        "its header is not valid JSON",
    ),
    "header not an object": (
        weights(safetensors_bytes("[]")),
        "model.safetensors",
        "its header is not a JSON ob",
    ),
    "header without tensors": (weights(safetensors_bytes({}, b"")), "model.safetensors", "it has no tensors"),
    "entry without a shape": (
        weights(safetensors_bytes({"x": {"dtype": "F32", "data_offsets": [0, 24]}})),
        "model.safetensors",
        "its header is damaged at tensor 'x'",
    ),
    "entry with one offset": (
        weights(safetensors_bytes({"x": {**ENTRY, "data_offsets": [0]}})),
        "model.safetensors",
        "its header is damaged at tensor 'x'",
    ),
    "entry with a fractional shape": (
        weights(safetensors_bytes({"x": {**ENTRY, "shape": [1.5]}})),
        "model.safetensors",
        "its header is damaged at tensor 'x'",
    ),
    "entry with a negative shape": (
        weights(safetensors_bytes({"x": {**ENTRY, "shape": [-2, -3]}})),
        "model.safetensors",
        "cannot be read",
    ),
    "shape that is not its data": (
        weights(safetensors_bytes({"x": {**ENTRY, "shape": [7]}})),
        "model.safetensors",
        "cannot be read",
    ),
    "data of two tensors overlapping": (
        weights(safetensors_bytes({"x": ENTRY, "y": ENTRY})),
        "model.safetensors",
        "cannot be read",
    ),
    "tensor named twice": (
        weights(safetensors_bytes(f'{{"x": {json.dumps(ENTRY)}, "x": {json.dumps(ENTRY)}}}')),
        "model.safetensors",
        "its header names 'x' twice",
    ),
    "dtype not supported": (
        weights(safetensors_bytes({"x": {**ENTRY, "dtype": "I16"}})),
        "model.safetensors",
        "tensor 'x' has dtype I16, which is not supported",
    ),
    "dtype unknown": (
        weights(safetensors_bytes({"x": {**ENTRY, "dtype": "Q9"}})),
        "model.safetensors",
        "tensor 'x' has dtype Q9, which is not supported",
    ),
}
INDEX_NAME = "model.safetensors.index.json"
DAMAGED_SHARDED: dict[str, tuple[Damage, str, str]] = {
    "shard missing": (remove(SECOND_NAME), SECOND_NAME, "is missing"),
    "shard truncated": (cut(FIRST_NAME, 4), FIRST_NAME, "truncated: its header announces 52 bytes of data"),
    "shard empty": (
        lambda folder: os.truncate(folder / SECOND_NAME, 0),
        SECOND_NAME,
        "truncated or damaged: 0",
    ),
    "shard of another checkpoint": (
        lambda folder: save_file({"z": torch.ones(2)}, folder / SECOND_NAME),
        INDEX_NAME,
        f"tensor 'c' should be in {SECOND_NAME}, which does not have it",
    ),
    "tensor listed in the wrong shard": (
        weight_map(b=SECOND_NAME),
        INDEX_NAME,
        f"tensor 'b' should be in {SECOND_NAME}, which does not have it",
    ),
    "tensor listed and nowhere": (weight_map(d=FIRST_NAME), INDEX_NAME, "tensor 'd' should be in"),
    "tensor in two shards": (
        lambda folder: save_file({**SECOND, "a": torch.ones(1)}, folder / SECOND_NAME),
        SECOND_NAME,
        f"tensor 'a' is here and in {FIRST_NAME} too",
    ),
    "tensor not listed": (
        lambda folder: save_file({**SECOND, "d": torch.ones(1)}, folder / SECOND_NAME),
        SECOND_NAME,
        f"tensor 'd' is not listed in {INDEX_NAME}",
    ),
    "index not JSON": (index_text("weights"), INDEX_NAME, "it is not valid JSON"),
    "index not an object": (index_text("[]"), INDEX_NAME, "it is not a JSON object"),
    "index without a map": (index_text("{}"), INDEX_NAME, "it has no 'weight_map'"),
    "index with an empty map": (index_text('{"weight_map": {}}'), INDEX_NAME, "it has no 'weight_map'"),
    "index with a list as its map": (
        index_text('{"weight_map": ["a"]}'),
        INDEX_NAME,
        "it has no 'weight_map'",
    ),
    "index that names a tensor twice": (
        index_text(f'{{"weight_map": {{"a": "{FIRST_NAME}", "a": "{SECOND_NAME}"}}}}'),
        INDEX_NAME,
        "it names 'a' twice",
    ),
    **{
        f"shard named {name!r}": (
            weight_map(c=name),
            INDEX_NAME,
            f"tensor 'c' is said to be in {name!r}, which is not a plain file name",
        )
        for name in (
            "../outside.safetensors",
            "/etc/passwd",
            "a/b",
            "..",
            ".",
            "",
            "a\0b",
            "..\\outside",
            7,
            None,
        )
    },
}


@pytest.mark.parametrize(("damage", "named", "reason"), DAMAGED_SINGLE.values(), ids=DAMAGED_SINGLE)
def test_damaged_folder_is_refused(tmp_path: Path, damage: Damage, named: str, reason: str) -> None:
    folder = write_single(tmp_path / "model")
    damage(folder)
    assert_refused(folder, named, reason)


@pytest.mark.parametrize(("damage", "named", "reason"), DAMAGED_SHARDED.values(), ids=DAMAGED_SHARDED)
def test_damaged_sharded_folder_is_refused(tmp_path: Path, damage: Damage, named: str, reason: str) -> None:
    save_file({"c": torch.zeros(1)}, tmp_path / "outside.safetensors")
    folder = write_sharded(tmp_path / "model")
    damage(folder)
    assert_refused(folder, named, reason)


def assert_refused(folder: Path, named: str, reason: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        FolderCheckpoint(folder)
    assert caught.value.message.startswith(f"{folder / named}: ")
    assert reason in caught.value.message


def test_random_damage_to_weights_is_read_or_refused_but_never_crashes(tmp_path: Path) -> None:
    folder = write_single(tmp_path / "model")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    source = random.Random(0)
    num_refused = 0
    for _ in range(1000):
        damaged = bytearray(whole)
        for _ in range(source.randint(1, 3)):
            damaged[source.randrange(len(damaged))] = source.choice(
                (0, 34, 48, 57, 93, 255, source.randrange(256))
            )
        path.write_bytes(damaged)
        try:
            checkpoint = FolderCheckpoint(folder)
            for name in checkpoint.tensor_names():
                assert checkpoint.tensor(name).shape == checkpoint.tensor_shape(name)
        except CheckpointError as error:
            assert str(path) in error.message
            num_refused += 1
    assert 50 < num_refused < 1000
