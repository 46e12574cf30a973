"""Peers on a tiny model and a CPU: they compute what they should, on the same weights as ours."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import peers
from benchmarks.gpu.checkpoint import write_checkpoint
from benchmarks.gpu.results import ResultLog
from benchmarks.gpu.weights import draw_weights, weight_shapes
from benchmarks.peers import transformers_gpu
from benchmarks.peers.plain_graph import PlainModel
from benchmarks.peers.served_engines import ServedEngine, served_engine
from graphllm.models.checkpoint import open_checkpoint
from graphllm.tokenizer.tokenizer import Tokenizer

CPU = torch.device("cpu")
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
QWEN = LLAMA | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 16,
    "tie_word_embeddings": False,
}
CONFIGS = pytest.mark.parametrize("config", [LLAMA, QWEN], ids=["llama", "qwen3"])


@CONFIGS
def test_names_and_shapes_are_those_of_transformers(config: dict[str, Any]) -> None:
    model = transformers_gpu.build_model(config, CPU, dtype=torch.float32)
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert weight_shapes(config) == theirs


def test_a_tensor_is_drawn_by_itself_whatever_came_before_it() -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    narrow = dict(draw_weights(LLAMA | {"intermediate_size": 40}, CPU))
    assert torch.equal(narrow[name], dict(draw_weights(LLAMA, CPU))[name])


@CONFIGS
def test_the_plain_step_computes_what_transformers_does(config: dict[str, Any]) -> None:
    model = transformers_gpu.build_model(config, CPU, dtype=torch.float32)
    weights = draw_weights(config, CPU, dtype=torch.float32)
    plain = PlainModel(config, weights, batch=2, max_context=8)
    tokens = torch.randint(config["vocab_size"], (2, 6), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = model(tokens).logits
        for position in range(6):
            logits = plain.step(tokens[:, position], position)
            torch.testing.assert_close(logits, expected[:, position], atol=1e-5, rtol=1e-4)


@CONFIGS
def test_a_written_checkpoint_holds_the_very_weights_that_are_drawn(
    config: dict[str, Any], tmp_path: Path
) -> None:
    write_checkpoint(config, tmp_path / "model", device=CPU)
    checkpoint = open_checkpoint(tmp_path / "model")
    drawn = dict(draw_weights(config, CPU))
    assert set(checkpoint.tensor_names()) == drawn.keys()
    for name, tensor in drawn.items():
        assert torch.equal(checkpoint.tensor(name), tensor), name


def test_a_checkpoint_is_cut_into_shards_that_its_index_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.gpu.checkpoint._SHARD_BYTES", 20_000)
    write_checkpoint(LLAMA, tmp_path / "model", device=CPU)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert set(open_checkpoint(tmp_path / "model").tensor_names()) == weight_shapes(LLAMA).keys()


def test_every_token_of_a_written_checkpoint_is_text_and_digits_are_a_token_each(tmp_path: Path) -> None:
    write_checkpoint(LLAMA, tmp_path / "model", device=CPU)
    tokenizer = Tokenizer.from_folder(tmp_path / "model")
    assert all(tokenizer.decode([token_id]) for token_id in range(259, LLAMA["vocab_size"]))
    empty = tokenizer.encode_chat([{"role": "user", "content": ""}])
    full = tokenizer.encode_chat([{"role": "user", "content": "0123456789" * 5}])
    assert len(full) - len(empty) == 50


def test_a_full_disk_is_said_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.gpu.checkpoint._SPARE_BYTES", 1 << 60)
    with pytest.raises(OSError, match="has no room"):
        write_checkpoint(LLAMA, tmp_path / "model", device=CPU)


@pytest.mark.parametrize("mode", ["single", "batched"])
def test_generate_gives_all_the_tokens_that_are_asked_for(mode: str) -> None:
    model = transformers_gpu.build_model(LLAMA, CPU, dtype=torch.float32)
    questions = transformers_gpu.prompts(320, num_prompts=3, num_tokens=5)
    answer = transformers_gpu.run_mode(mode, model, questions, max_tokens=4, num_single=2)
    assert answer["num_tokens"] == {"single": 2 * 4, "batched": 3 * 4}[mode]
    assert answer["seconds"] > 0


def test_rates_are_tokens_over_seconds_and_an_error_is_its_own_reason(tmp_path: Path) -> None:
    log = ResultLog("peers", "peers", folder=tmp_path)
    answer = {"mode": "single", "num_tokens": 256, "seconds": 2.0}
    assert peers.write_rate(log, "rate", answer, peer="transformers") == 128
    assert peers.write_rate(log, "other", {"mode": "x", "error": "no room"}, peer="transformers") is None
    assert peers.write_rate(log, "third", None, peer="transformers") is None
    assert [result.reason for result in log.results] == [None, "no room", "no time was left"]


def test_what_a_peer_had_said_when_its_time_was_over_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"mode": "single", "value": 1}), "a library's own words", json.dumps({"other": 1})]
    said = "; ".join(f"print({line!r}, flush=True)" for line in lines)
    (tmp_path / "slow_peer.py").write_text(f"import time; {said}; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert list(peers.ask("slow_peer", [], seconds=3.0)) == [{"mode": "single", "value": 1}]
    assert list(peers.ask("slow_peer", [], seconds=0.0)) == []


def test_an_engine_that_does_not_start_is_an_error_with_the_end_of_its_log() -> None:
    engine = ServedEngine("nothing", ("no_such_module", "--model", "{model}", "--port", "{port}"))
    with pytest.raises(RuntimeError, match=r"nothing did not become ready.*No module named"):  # noqa: SIM117
        with served_engine(engine, "model", ready_timeout=30):
            pytest.fail("it did start")


def test_an_engine_is_given_its_model_and_ended_afterwards(tmp_path: Path) -> None:
    engine = ServedEngine("files", ("http.server", "{port}", "--bind", "127.0.0.1", "--directory", "{model}"))
    (tmp_path / "health").write_text("fine")
    with (
        served_engine(engine, str(tmp_path), ready_timeout=30) as url,
        urllib.request.urlopen(f"{url}/health") as answer,
    ):
        assert answer.read() == b"fine"
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{url}/health")
