"""A checkpoint that is damaged in any of its files is refused before serving: file and fault are named.

Each case damages a whole small model and goes the way that a server goes to load it. What only the
containers can get wrong, byte by byte, is in `test_safetensors_folder.py` and `test_gguf_file.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from graphllm.attention.paged import PagedAttention
from graphllm.errors import CheckpointError
from graphllm.kernels.linear import linear_ref
from graphllm.models.checkpoint import open_checkpoint
from graphllm.models.decoder import Decoder
from graphllm.models.registry import find_family, read_model_config
from graphllm.models.transformers_fallback import find_fallback
from graphllm.models.weights import load_model
from tests.models.small_gguf import small_tensors, write_small_llama
from tests.tiny_model import HIDDEN, write_tiny_model

Damage = Callable[[Path], object]
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# Nothing here reads more than the small model has; what would wait or fill the memory is stopped.
pytestmark = pytest.mark.timeout(20)


def load(path: Path) -> Decoder:
    """All that is read before a model is served."""
    checkpoint = open_checkpoint(path)
    checkpoint.load_tokenizer()
    assert find_fallback(checkpoint, model_impl="auto", trust_remote_code=False) is None
    read_model_config(checkpoint, find_family(checkpoint))
    return load_model(
        checkpoint,
        backend=PagedAttention(block_size=16),
        device=torch.device("cpu"),
        dtype=torch.float32,
        product=linear_ref,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("whole") / "model")


def text(name: str, content: str | bytes) -> Damage:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def keys(name: str, **changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**content, **changes}))

    return damage


def config(**changes: Any) -> Damage:
    return keys("config.json", **changes)


def header(content: str | dict[str, Any], data: bytes = bytes(4)) -> Damage:
    encoded = (content if isinstance(content, str) else json.dumps(content)).encode()
    return text(WEIGHTS, struct.pack("<Q", len(encoded)) + encoded + data)


def entry(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes}


def tensors(**changes: torch.Tensor | None) -> Damage:
    """Tensors by their names with `__` for a dot; None takes one away."""

    def damage(folder: Path) -> None:
        stored = load_file(folder / WEIGHTS)
        stored |= {name.replace("__", "."): value for name, value in changes.items() if value is not None}
        for name in (name.replace("__", ".") for name, value in changes.items() if value is None):
            del stored[name]
        save_file(stored, folder / WEIGHTS)

    return damage


def sharded(**changes: Any) -> Damage:
    """In one shard with an index, of which entries are changed."""

    def damage(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "shard.safetensors")
        weight_map = dict.fromkeys(load_file(folder / "shard.safetensors"), "shard.safetensors")
        weight_map |= {name.replace("__", "."): value for name, value in changes.items()}
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return damage


def instead_of(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def cut(name: str, num_bytes: int) -> Damage:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - num_bytes)


# What is done to the folder, the file that the refusal names, and what it says of it.
FOLDERS: dict[str, tuple[Damage, str, str]] = {
    "config cut off": (cut("config.json", 1), "config.json", "not valid JSON"),
    "layers beyond memory": (config(num_hidden_layers=10**9), "", "'num_hidden_layers' is 1000000000;"),
    "layers of no checkpoint": (config(num_hidden_layers=2000), "", "tensors 'model.layers.10.input"),
    "layers by a fraction": (config(num_hidden_layers=2.5), "", "'num_hidden_layers' is 2.5"),
    "layers by a truth": (config(num_hidden_layers=True), "", "'num_hidden_layers' is True"),
    "width beyond memory": (config(hidden_size=10**9), "", "has shape [259, 48]; the configuration asks for"),
    "vocabulary beyond memory": (config(vocab_size=2**31 - 1), "", "asks for [2147483647, 48]"),
    "vocabulary beyond torch": (config(vocab_size=10**12), "", "'vocab_size' is 1000000000000, more than"),
    "inner width beyond memory": (config(intermediate_size=10**9), "", "asks for [1000000000, 48]"),
    "heads beyond memory": (config(num_attention_heads=10**8), "", "asks for"),
    "heads of a billion": (config(head_dim=10**9), "", "'head_dim' is 1000000000; at most"),
    "heads that do not divide": (config(num_attention_heads=3), "", "is 2, which does not divide 3 heads"),
    "context without end": (config(max_position_embeddings=10**30), "", "'max_position_embeddings' is 1000"),
    "norm of NaN": (config(rms_norm_eps=float("nan")), "", "'rms_norm_eps' is nan, not a positive number"),
    "norm of infinity": (config(rms_norm_eps=float("inf")), "", "'rms_norm_eps' is inf"),
    "norm beyond every float": (config(rms_norm_eps=10**400), "", "'rms_norm_eps' is 1000"),
    "negative rotary base": (config(rope_theta=-1.0), "", "rope_theta' is -1.0"),
    "rotary factor of NaN": (
        config(rope_scaling={"type": "linear", "factor": float("nan")}),
        "",
        "factor' is nan, not a positive number",
    ),
    "architecture of lists": (config(architectures=[["LlamaForCausalLM"]]), "", "['LlamaForCausalLM']"),
    "two architectures": (config(architectures=["A", "B"]), "", "it should name one architecture"),
    "activation of no name": (config(hidden_act={}), "", "'hidden_act' is {}"),
    "a key of unknown meaning": (config(attention_twist=2), "", "'attention_twist' (2) is not understood"),
    "end token below zero": (config(eos_token_id=-5), "config.json", "eos_token_id is -5"),
    "end token of NaN": (
        text("generation_config.json", '{"eos_token_id": NaN}'),
        "generation_config.json",
        "eos_token_id is nan",
    ),
    "tokenizer cut off": (cut("tokenizer.json", 50), "tokenizer.json", "not a tokenizer that can be read"),
    "tokenizer of noise": (text("tokenizer.json", b"\xff\0" * 99), "tokenizer.json", "not a tokenizer"),
    "tokenizer nested beyond measure": (text("tokenizer.json", "[" * 10**5), "tokenizer.json", "not a"),
    "tokenizer of the wrong decoder": (keys("tokenizer.json", decoder=None), "", "no decoder"),
    "added tokens of the wrong kind": (
        keys("tokenizer_config.json", added_tokens_decoder={"259": "zz"}),
        "tokenizer_config.json",
        "'zz' is no object",
    ),
    "added token far beyond the vocabulary": (
        keys("tokenizer_config.json", added_tokens_decoder={"999999999999": {"content": "zz"}}),
        "tokenizer_config.json",
        "gives 'zz' the id 999999999999",
    ),
    "end token that is none": (keys("tokenizer_config.json", eos_token="zz"), "", "eos_token is 'zz'"),
    "template not closed": (text("chat_template.jinja", "{% for x in y %}"), "", "not valid Jinja, line 1"),
    "template that includes itself": (
        text("chat_template.jinja", "\n{% include 'default' %}"),
        "",
        "refers to another template, line 2",
    ),
    "template that extends itself": (
        text("chat_template.jinja", "{% extends 'chat_template.jinja' %}"),
        "",
        "refers to another template, line 1",
    ),
    "template nested beyond measure": (
        text("chat_template.jinja", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"),
        "",
        "nested too deeply",
    ),
    "template of 2 MB": (text("chat_template.jinja", "x" * 2**21), "chat_template.jinja", "larger than"),
    "template of noise": (text("chat_template.jinja", b"\xff\xfe"), "chat_template.jinja", "cannot be read"),
    "template that is a number": (keys("tokenizer_config.json", chat_template=7), "", "chat_template is"),
    "templates within templates": (
        keys("tokenizer_config.json", chat_template={"default": {"default": "x"}}),
        "tokenizer_config.json",
        "neither a text nor a list of named texts",
    ),
    "tensor missing": (tensors(model__norm__weight=None), "", "tensor 'model.norm.weight' is missing"),
    "tensor too many": (tensors(model__other__weight=torch.ones(1)), "", "'model.other.weight' is not used"),
    "tensor of a layer beyond count": (
        tensors(**{f"model__layers__{10**30}__x": torch.ones(1)}),
        "",
        "is not used by the model",
    ),
    "tensor without dimensions": (tensors(model__norm__weight=torch.tensor(1.0)), "", "has shape []"),
    "tensor without elements": (tensors(model__norm__weight=torch.ones(0)), "", "has shape [0]"),
    "tensor of bytes": (
        tensors(model__norm__weight=torch.ones(HIDDEN, dtype=torch.uint8)),
        "",
        "holds uint8, not floating-point numbers",
    ),
    "tensor of integers": (
        tensors(model__norm__weight=torch.ones(HIDDEN, dtype=torch.int64)),
        "",
        "holds int64, not floating-point numbers",
    ),
    "tensor of 8-bit floats without scales": (
        tensors(model__norm__weight=torch.ones(HIDDEN).to(torch.float8_e4m3fn)),
        "",
        "holds float8_e4m3fn, not floating-point numbers",
    ),
    "tensor of short integers": (
        tensors(model__norm__weight=torch.ones(HIDDEN, dtype=torch.int16)),
        WEIGHTS,
        "has dtype I16, which is not supported",
    ),
    "weights cut off": (cut(WEIGHTS, 100), WEIGHTS, "truncated"),
    "weights with more behind them": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + bytes(8)),
        WEIGHTS,
        "cannot be read",
    ),
    "header longer than the file": (text(WEIGHTS, b"\xff" * 64), WEIGHTS, "cannot hold the header"),
    "data before the beginning": (header(entry(data_offsets=[-4, 0])), WEIGHTS, "cannot be read"),
    "data that ends before it begins": (header(entry(data_offsets=[8, 4]), bytes(8)), WEIGHTS, "cannot be"),
    "data with a hole": (header(entry(data_offsets=[4, 8]), bytes(8)), WEIGHTS, "cannot be read"),
    "data shared by two tensors": (header({**entry(), "y": entry()["x"]}), WEIGHTS, "cannot be read"),
    "shape beyond 64 bits": (header(entry(shape=[2**62, 2**62])), WEIGHTS, "cannot be read"),
    "shape of 5000 digits": (
        header(f'{{"x": {{"dtype": "F32", "shape": [1{"0" * 5000}], "data_offsets": [0, 4]}}}}'),
        WEIGHTS,
        "its header is not valid JSON",
    ),
    "shape of NaN": (
        header('{"x": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}'),
        WEIGHTS,
        "its header is damaged at tensor 'x'",
    ),
    "index to a shard outside": (
        sharded(model__norm__weight="../outside.safetensors"),
        INDEX,
        "'../outside.safetensors', which is not a plain file name",
    ),
    "index to the root": (sharded(model__norm__weight="/etc/passwd"), INDEX, "not a plain file name"),
    "index to a shard that is missing": (
        sharded(model__norm__weight="other.safetensors"),
        "other.safetensors",
        "is missing",
    ),
    "index with a tensor that is nowhere": (sharded(x="shard.safetensors"), INDEX, "tensor 'x' should be in"),
    "weights a link to another file": (
        instead_of(WEIGHTS, lambda path: path.symlink_to("/etc/passwd")),
        WEIGHTS,
        "truncated or damaged",
    ),
    **{
        f"{name} {what}": (instead_of(name, make), name, "")
        for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                     "special_tokens_map.json", "chat_template.jinja", "chat_template.json", WEIGHTS)
        for what, make in (
            ("a pipe", os.mkfifo),
            ("a device without end", lambda path: path.symlink_to("/dev/zero")),
            ("a link to itself", lambda path: path.symlink_to(path.name)),
            ("a folder", Path.mkdir),
        )
    },
}  # fmt: skip


def test_the_folder_is_right_before_it_is_damaged(whole: Path) -> None:
    assert load(whole).config.hidden_size == HIDDEN


@pytest.mark.parametrize(("damage", "named", "reason"), FOLDERS.values(), ids=FOLDERS)
def test_damaged_folder_is_refused(
    whole: Path, tmp_path: Path, damage: Damage, named: str, reason: str
) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    save_file({"model.norm.weight": torch.ones(HIDDEN)}, tmp_path / "outside.safetensors")
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert str(folder / named if named else folder) in caught.value.message
    assert reason in caught.value.message


def without(name: str) -> dict[str, Any]:
    return {"without": [name]}


def with_tensor(name: str, values: np.ndarray[Any, Any]) -> dict[str, Any]:
    return {"tensors": {**small_tensors(), name: values}}


# What the file is written with, and what the refusal says.
GGUFS: dict[str, tuple[dict[str, Any], str]] = {
    "an architecture that nobody knows": ({"architecture": "unheard-of"}, "unheard-of"),
    "no layer count": (without("llama.block_count"), "llama.block_count"),
    "layers beyond memory": ({"metadata": {"llama.block_count": 10**9}}, "llama.block_count"),
    "layers of another model": ({"metadata": {"llama.block_count": 3}}, "llama.block_count"),
    "width of another model": ({"metadata": {"llama.embedding_length": 64}}, "llama.embedding_length"),
    "heads that are none": ({"metadata": {"llama.attention.head_count": 0}}, "head"),
    "norm of NaN": ({"metadata": {"llama.attention.layer_norm_rms_epsilon": float("nan")}}, "nan"),
    "rotary base of infinity": ({"metadata": {"llama.rope.freq_base": float("inf")}}, "inf"),
    "context that is text": ({"metadata": {"llama.context_length": "long"}}, "long"),
    "no tokens": (without("tokenizer.ggml.tokens"), "tokenizer.ggml.tokens"),
    "a tokenizer that nobody knows": ({"metadata": {"tokenizer.ggml.model": "unheard-of"}}, "unheard-of"),
    "token types of another length": ({"metadata": {"tokenizer.ggml.token_type": [1]}}, "token_type"),
    "end token beyond the vocabulary": ({"metadata": {"tokenizer.ggml.eos_token_id": 10**6}}, "eos"),
    "a merge of one part": ({"metadata": {"tokenizer.ggml.merges": ["hi"]}}, "merge"),
    "template that includes itself": (
        {"metadata": {"tokenizer.chat_template": "{% include 'default' %}"}},
        "refers to another template",
    ),
    "a tensor missing": (without("output_norm.weight"), "'model.norm.weight' is missing"),
    "a tensor too many": (with_tensor("blk.0.other.weight", np.ones(4, np.float32)), "blk.0.other.weight"),
    "a tensor of another shape": (with_tensor("output_norm.weight", np.ones(4, np.float32)), "has shape [4]"),
}


@pytest.mark.parametrize(("changes", "reason"), GGUFS.values(), ids=GGUFS)
def test_damaged_gguf_model_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = write_small_llama(tmp_path / "damaged.gguf", **changes)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(path) in caught.value.message
    assert reason in caught.value.message


def test_the_gguf_file_is_right_before_it_is_damaged(tmp_path: Path) -> None:
    assert load(write_small_llama(tmp_path / "m.gguf")).config.num_layers == 2


def test_memory_is_taken_only_for_what_the_checkpoint_has(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    config(vocab_size=300)(folder)
    built: list[torch.device] = []
    build = Decoder.__init__

    def recording(self: Decoder, *arguments: Any, **options: Any) -> None:
        built.append(options["device"])
        build(self, *arguments, **options)

    monkeypatch.setattr(Decoder, "__init__", recording)
    with pytest.raises(CheckpointError, match="asks for"):
        load(folder)
    assert built == [torch.device("meta")]
