"""A checkpoint that cannot be right is refused before anything is served, by the name of its file."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from graphllm import cli
from graphllm.models.checkpoint import open_checkpoint
from tests.e2e.serving import small_environment

FIRST_SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def broken(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to break, in two shards with an index."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "broken"))
    single = folder / "model.safetensors"
    tensors = load_file(single)
    single.unlink()
    weight_map = {}
    for number in (1, 2):
        shard = f"model-{number:05}-of-00002.safetensors"
        names = sorted(tensors)[number - 1 :: 2]
        save_file({name: tensors[name] for name in names}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A server sets up the process' logging; this process is pytest's."""
    logger = logging.getLogger("graphllm")
    earlier = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = earlier


def truncate(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:-100])

    return apply


def delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def configure(**fields: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return apply


def drop_from_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncate(FIRST_SHARD), FIRST_SHARD),
        (delete(FIRST_SHARD), FIRST_SHARD),
        (write(FIRST_SHARD, b""), FIRST_SHARD),
        (write(FIRST_SHARD, b"\xff" * 1000), FIRST_SHARD),
        (delete("config.json"), "config.json"),
        (write("config.json", b"{"), "config.json"),
        (configure(architectures=["UnheardOfForCausalLM"]), "UnheardOfForCausalLM"),
        (configure(hidden_size=128), "model.embed_tokens.weight"),
        (configure(intermediate_size=128), "mlp"),
        (configure(num_hidden_layers=3), "model.layers.2"),
        (configure(num_hidden_layers=1), "model.layers.1"),
        (configure(vocab_size=300), "model.embed_tokens.weight"),
        (configure(num_key_value_heads=1), "self_attn"),
        (drop_from_index, "model.norm.weight"),
        (delete("tokenizer.json"), "tokenizer.json"),
        (write("tokenizer.json", b"{}"), "tokenizer.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_checkpoint_is_refused(
    broken: Path, damage: Callable[[Path], None], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(broken)
    # The command line itself, in this process, because starting another takes seconds.
    code = cli.main(["--model", str(broken), "--port", "0", "--cpu-threads", "1"])
    assert code == 1
    assert named in the_refusal(capsys.readouterr().err)


def test_the_shards_are_right_before_they_are_broken(broken: Path) -> None:
    assert open_checkpoint(broken).tensor("model.norm.weight").shape == (48,)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "no" / "such" / "model"
    assert str(missing) in process_refusal("--model", str(missing))


def test_a_truncated_shard_is_refused(broken: Path) -> None:
    truncate(FIRST_SHARD)(broken)
    assert FIRST_SHARD in process_refusal("--model", str(broken))


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model")
    assert str(path) in process_refusal("--model", str(path))


def the_refusal(stderr: str) -> str:
    """The one line that says why; fails when there was more to it, or when it served."""
    lines = [line for line in stderr.splitlines() if line.startswith("graphllm: error: ")]
    assert len(lines) == 1 and "Traceback" not in stderr and "ready" not in stderr, stderr
    return lines[0]


def process_refusal(*arguments: str) -> str:
    """The refusal of a `python -m graphllm`, which must exit with 1."""
    done = subprocess.run(
        [sys.executable, "-m", "graphllm", "--port", "0", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=small_environment(),
        check=False,
    )
    assert done.returncode == 1, done.stderr
    return the_refusal(done.stderr)
