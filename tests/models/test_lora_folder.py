"""Adapters that are damaged, or ask for what is not served: each is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graphllm.attention.paged import PagedAttention
from graphllm.errors import CheckpointError
from graphllm.kernels.linear import linear_ref
from graphllm.layers.lora import AdapterLayout, AdapterViews
from graphllm.models.adaptable import adaptable_layers
from graphllm.models.adapter_names import AdapterNames
from graphllm.models.checkpoint import open_checkpoint
from graphllm.models.lora import AdapterFolder
from graphllm.models.registry import find_family
from graphllm.models.weights import load_model
from tests.tiny_adapters import ALL_TARGETS, write_tiny_adapter
from tests.tiny_model import HEAD_DIM, HEADS, HIDDEN, LAYERS, write_tiny_model

MAX_RANK = 8
FIRST_QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


class Base:
    """The tiny model, as adapters see it."""

    def __init__(self, folder: Path) -> None:
        checkpoint = open_checkpoint(write_tiny_model(folder))
        model = load_model(
            checkpoint,
            backend=PagedAttention(block_size=8),
            device=torch.device("cpu"),
            dtype=torch.float32,
            product=linear_ref,
        )
        self.names = AdapterNames(model, find_family(checkpoint))
        self.layout = AdapterLayout(adaptable_layers(model), max_rank=MAX_RANK, dtype=torch.float32)

    def read(self, folder: Path) -> torch.Tensor:
        opened = AdapterFolder(folder, self.names, max_rank=MAX_RANK)
        image = torch.full((self.layout.num_bytes,), 0xFF, dtype=torch.uint8)
        for _ in opened.read_in_slices(image, self.layout):
            pass
        return image


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(tmp_path_factory.mktemp("lora-base") / "model")


def test_a_layer_that_an_adapter_leaves_alone_has_no_scale_and_ranks_end_in_zeros(
    base: Base, tmp_path: Path
) -> None:
    folder = write_tiny_adapter(tmp_path / "a", rank=3, targets=("k_proj",), lora_alpha=6)
    image = base.read(folder)
    qkv = base.layout.views(image[None], "layers.1.attention.qkv")
    assert qkv.scales.tolist() == [[0.0, 2.0, 0.0]]
    assert qkv.down[0, 1, 3:].abs().max() == 0 and qkv.down[0, 1, :3].abs().min() > 0
    assert qkv.up[0, :, 3:].abs().max() == 0 and qkv.up[0, : HEADS * HEAD_DIM].abs().max() == 0
    assert base.layout.views(image[None], "layers.1.mlp.down").scales.tolist() == [[0.0]]


def test_rank_stabilized_adapters_divide_by_the_root_of_the_rank(base: Base, tmp_path: Path) -> None:
    image = base.read(write_tiny_adapter(tmp_path / "a", rank=4, use_rslora=True, lora_alpha=6))
    assert base.layout.views(image[None], "layers.0.attention.output").scales.tolist() == [[3.0]]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"peft_type": "IA3"}, "'peft_type' is 'IA3'; LORA is what is served"),
        ({"use_dora": True}, "'use_dora' is set: DoRA"),
        ({"modules_to_save": ["lm_head"]}, "'modules_to_save' is set"),
        ({"bias": "all"}, "'bias' is 'all'"),
        ({"lora_bias": True}, "'lora_bias' is set"),
        ({"fan_in_fan_out": True}, "'fan_in_fan_out' is set"),
        ({"layer_replication": [[0, 2]]}, "'layer_replication' is set"),
        ({"init_lora_weights": "pissa_niter_4"}, "'init_lora_weights' is 'pissa_niter_4'"),
        ({"brand_new": 3}, "'brand_new' is 3, and nobody here knows"),
        ({"r": 0}, "'r' has 0, which is no rank"),
        ({"r": "4"}, "'r' has '4', which is no rank"),
        ({"r": True}, "'r' has True, which is no rank"),
        ({"lora_alpha": float("nan")}, "'lora_alpha' has nan, which is no number"),
        ({"use_rslora": "yes"}, "'use_rslora' is 'yes'"),
        ({"rank_pattern": {"q_proj": -1}}, "'rank_pattern' has -1"),
        ({"rank_pattern": {"(": 4}}, "'rank_pattern' has '(', which is no pattern"),
        ({"rank_pattern": {"(a|.*)*": 4}}, "'rank_pattern' has '(a|.*)*'; at most 2"),
        ({"rank_pattern": {"(a|a)(a|a)(a|a)": 4}}, "'rank_pattern' has '(a|a)(a|a)(a|a)'; at most 2"),
        (
            {"alpha_pattern": dict.fromkeys(map(str, range(1025)), 4)},
            "'alpha_pattern' has 1025 patterns, 0 of which are more than a name; at most 1024 and 16",
        ),
        (
            {"alpha_pattern": {f".*{number}": 4 for number in range(17)}},
            "'alpha_pattern' has 17 patterns, 17 of which are more than a name; at most 1024 and 16",
        ),
        ({"alpha_pattern": [1]}, "'alpha_pattern' is [1]"),
        ({"alpha_pattern": {"q_proj": 1e300}}, "'alpha_pattern' has 1e+300, which is no number"),
        ({"target_modules": {"q_proj": 1}}, "'target_modules' is {'q_proj': 1}"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configurations_that_are_not_honoured_are_refused_by_key(
    change: dict[str, Any], expected: str, base: Base, tmp_path: Path
) -> None:
    folder = write_tiny_adapter(tmp_path / "a", **change)
    with pytest.raises(CheckpointError) as caught:
        base.read(folder)
    assert caught.value.message.startswith(f"{folder / 'adapter_config.json'}: {expected}")


def without(*keys: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        config = {key: value for key, value in json.loads(path.read_text()).items() if key not in keys}
        path.write_text(json.dumps(config))

    return change


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def linked(folder: Path) -> None:
    """To itself."""
    path = folder / "adapter_model.safetensors"
    path.unlink()
    path.symlink_to(path)


def piped(folder: Path) -> None:
    """Who opens it waits for ever."""
    path = folder / "adapter_config.json"
    path.unlink()
    os.mkfifo(path)


def lying(folder: Path) -> None:
    """A tensor's bytes begin before its own."""
    path = folder / "adapter_model.safetensors"
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    first = min((entry for name, entry in header.items()), key=lambda entry: entry["data_offsets"][1])
    first["data_offsets"][0] -= 4
    written = json.dumps(header).encode()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    path.write_bytes(len(written).to_bytes(8, "little") + written + data)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without("r"), "'r' is missing"),
        (without("peft_type"), "'peft_type' is missing"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json: is missing"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not valid JSON"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "safetensors: is missing"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""), "truncated or damaged"),
        (cut, "truncated"),
        (pickled, "only as adapter_model.bin; convert them"),
        (linked, "safetensors: is missing"),
        (piped, "adapter_config.json: is not a regular file"),
        (lying, "header is damaged at tensor"),
    ],
    ids=["r", "kind", "config", "json", "weights", "empty", "cut", "pickle", "link", "pipe", "lie"],
)
def test_damaged_folders_are_refused(
    change: Callable[[Path], Any], expected: str, base: Base, tmp_path: Path
) -> None:
    folder = write_tiny_adapter(tmp_path / "a")
    change(folder)
    with pytest.raises(CheckpointError, match=expected) as caught:
        base.read(folder)
    assert str(folder) in caught.value.message


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({f"{FIRST_QUERY}.lora_B.weight": None}, "has no lora_B"),
        (
            {f"{FIRST_QUERY}.lora_A.weight": torch.zeros(4, HIDDEN).to(torch.float8_e4m3fn)},
            "holds F8_E4M3; F32, F16, BF16",
        ),
        ({f"{FIRST_QUERY}.lora_A.weight": torch.zeros(5, HIDDEN)}, r"has shape \[5, 48\]; .* \[4, 48\]"),
        ({f"{FIRST_QUERY}.lora_B.weight": torch.zeros(8, 4)}, r"has shape \[8, 4\]; .* \[64, 4\]"),
        ({f"{FIRST_QUERY}.lora_A.weight": torch.full((4, HIDDEN), torch.nan)}, "values that are no numbers"),
        (
            {f"{FIRST_QUERY}.lora_A.weight": torch.zeros(4, HIDDEN, dtype=torch.uint8)},
            "holds U8; F32, F16, BF16 are what adapters hold",
        ),
        (
            {f"{FIRST_QUERY}.lora_A.weight": None, f"{FIRST_QUERY}.lora_B.weight": None},
            "no tensors of 'model.layers.0.self_attn.q_proj', though",
        ),
        ({f"{FIRST_QUERY}.lora_magnitude_vector": torch.ones(64)}, "is not of a plain LoRA layer"),
        (
            {
                "base_model.model.lm_head.lora_A.weight": torch.ones(4, HIDDEN),
                "base_model.model.lm_head.lora_B.weight": torch.ones(259, 4),
            },
            "changes 'lm_head', an embedding or a head",
        ),
        (
            {
                "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(4, HIDDEN),
                "base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight": torch.ones(64, 4),
            },
            "changes 'model.layers.7.self_attn.q_proj', which is no linear layer of this model",
        ),
        (
            {
                f"{FIRST_QUERY}.lora_A.default.weight": torch.ones(4, HIDDEN),
            },
            "is there twice",
        ),
    ],
    ids=[
        "B",
        "8 bits",
        "A's shape",
        "B's shape",
        "NaN",
        "bytes",
        "no layer",
        "DoRA",
        "head",
        "layer 7",
        "twice",
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    tensors: dict[str, torch.Tensor | None], expected: str, base: Base, tmp_path: Path
) -> None:
    folder = write_tiny_adapter(tmp_path / "a", tensors=tensors)
    with pytest.raises(CheckpointError, match=expected) as caught:
        base.read(folder)
    assert caught.value.message.startswith(f"{folder / 'adapter_model.safetensors'}: ")


def test_a_rank_above_the_largest_is_refused_with_the_flag(base: Base, tmp_path: Path) -> None:
    folder = write_tiny_adapter(tmp_path / "a", rank=MAX_RANK + 1)
    with pytest.raises(CheckpointError, match="rank, 9, is above --max-lora-rank 8"):
        base.read(folder)


def test_tensors_of_layers_that_no_target_means_are_refused(base: Base, tmp_path: Path) -> None:
    folder = write_tiny_adapter(tmp_path / "a", target_modules=["k_proj"])
    with pytest.raises(CheckpointError, match="which its 'target_modules' does not name"):
        base.read(folder)


@pytest.mark.parametrize(
    ("path", "reason"),
    [("nothing", "no such folder"), ("x" * 300, "cannot be read: .*name too long"), ("file", "not a folder")],
    ids=["nothing", "too long", "file"],
)
def test_a_folder_that_is_none_is_refused(path: str, reason: str, base: Base, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=reason):
        base.read(tmp_path / path)


@pytest.mark.parametrize("reads", [0, 1])
@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.truncate(path, 5000),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: path.with_suffix(".new").rename(path),
    ],
    ids=["shorter", "rewritten", "replaced"],
)
def test_a_file_that_changes_while_it_is_read_is_refused_or_read_as_it_was(
    change: Callable[[Path], Any], reads: int, base: Base, tmp_path: Path
) -> None:
    """A mapped file that became shorter would end the process."""
    folder = write_tiny_adapter(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    expected = base.read(folder)
    path.with_suffix(".new").write_bytes(bytes(path.stat().st_size))
    os.utime(path, ns=(0, 0))
    image = torch.full((base.layout.num_bytes,), 0xFF, dtype=torch.uint8)
    slices = AdapterFolder(folder, base.names, max_rank=MAX_RANK).read_in_slices(image, base.layout)
    for _ in range(reads * (1 + len(ALL_TARGETS) * LAYERS)):
        next(slices)
    change(path)
    try:
        for _ in slices:
            pass
    except CheckpointError as error:
        assert error.message.startswith(f"{path}: it ") and "while it was read" in error.message
    else:
        assert reads == 1 and not path.with_suffix(".new").exists(), "it had opened what was replaced"
        views = (base.layout.views(each[None], "layers.1.mlp.down") for each in (image, expected))
        assert all(torch.equal(*pair) for pair in zip(*map(dataclass_values, views), strict=True))


def dataclass_values(views: AdapterViews) -> list[torch.Tensor]:
    return [views.down, views.up, views.scales]
