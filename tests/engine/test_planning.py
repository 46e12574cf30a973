"""`graphllm plan`: the server's own arithmetic, without a GPU and without weights."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graphllm import cli
from graphllm.config import EngineConfig, PlanConfig
from graphllm.engine.planning import (
    ASSUMED_GRAPH_BYTES,
    CapacityPlan,
    as_json,
    as_text,
    plan_capacity,
)
from graphllm.errors import CheckpointError, ConfigError
from tests.models.small_gguf import write_small_llama
from tests.tiny_model import write_tiny_model

SHAPES = Path(__file__).parents[2] / "benchmarks" / "shapes"
GIB = 1024**3


def capacity(name: str = "llama-3.1-8b", gpu: str = "h100", **flags: Any) -> CapacityPlan:
    return plan_capacity(EngineConfig(model=str(SHAPES / f"{name}.json"), **flags), PlanConfig(gpu=gpu))


def test_the_parts_add_up_to_what_may_be_in_use() -> None:
    plan = as_json(capacity())
    parts = plan["weight_bytes"]["total"] + plan["kv_cache_bytes"] + plan["context_bytes_assumed"]
    parts += plan["arena_bytes_estimated"] + plan["table_bytes_estimated"] + plan["graph_bytes_assumed"]
    assert parts == pytest.approx(0.9 * plan["total_bytes"], abs=2)
    weights = dict(plan["weight_bytes"])
    assert weights.pop("total") == sum(weights.values()) == 2 * 8_030_261_248


def test_concurrency_is_blocks_over_the_blocks_of_a_sequence() -> None:
    plan = capacity()
    assert plan.plan is not None
    assert plan.num_usable_blocks == plan.plan.num_blocks - 1
    counts = plan.concurrency()
    assert list(counts) == [512, 1024, 4096, 16384, 65536, 131072]
    assert all(count == plan.num_usable_blocks * 16 // length for length, count in counts.items())
    assert list(capacity(max_model_len=5000).concurrency()) == [512, 1024, 4096, 5000]
    # A sequence's last block is its own, however little of it is used.
    assert capacity(max_model_len=5001).num_sequences(5001) == plan.num_usable_blocks // 313


def test_places_for_adapters_come_off_the_kv_cache() -> None:
    plain, adapted = (
        as_json(capacity(enable_lora=on, max_loras=3, max_lora_rank=32)) for on in (False, True)
    )
    # Of a layer: what each part reads and what it writes.
    reads, writes = 3 * 4096 + 4096 + 2 * 4096 + 14336, 6144 + 4096 + 2 * 14336 + 4096
    assert plain["adapter_bytes"] == 0
    assert adapted["adapter_bytes"] == pytest.approx(3 * 32 * 32 * 2 * (reads + writes), rel=1e-3)
    assert plain["kv_cache_bytes"] - adapted["kv_cache_bytes"] == adapted["adapter_bytes"]
    assert "--max-loras 3 of --max-lora-rank 32" in as_text(
        capacity(enable_lora=True, max_loras=3, max_lora_rank=32)
    )


def test_windowed_layers_take_no_more_than_their_window_of_a_long_context() -> None:
    plan = capacity("gpt-oss-20b")
    assert as_json(plan)["kv_groups"] == [
        {"layers": 12, "sliding_window": None},
        {"layers": 12, "sliding_window": 128},
    ]
    # Of a context of 131,072 tokens: 8,192 blocks of one group; of the other those that 128 tokens and the
    # next one lie in, and once, for whoever is at its prompt, those of a step of 2,048.
    settled, step = 8192 + 8, 2048 // 16 + 2
    assert plan.num_sequences(131072) == (plan.num_usable_blocks - step) // settled == 18
    everything = dataclasses.replace(plan, kv_shape=dataclasses.replace(plan.kv_shape, kv_groups=None))
    assert everything.num_sequences(131072) == 9
    assert "24.0 KiB beyond windows" in as_text(plan)
    assert "blocks of 16 tokens and 12 layers, in 2 groups of layers" in as_text(plan)


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        ({"dtype": "float32"}, "weight_bytes"),
        ({"gpu_memory_utilization": 0.5}, "kv_cache_bytes"),
        ({"kv_cache_memory_bytes": 30 * GIB}, "kv_cache_bytes"),
        ({"max_model_len": 4096}, "max_model_len"),
        ({"max_num_seqs": 8}, "table_bytes_estimated"),
        ({"max_num_batched_tokens": 512}, "arena_bytes_estimated"),
        ({"block_size": 64}, "num_usable_blocks"),
        ({"enforce_eager": True}, "graph_bytes_assumed"),
    ],
)
def test_an_engine_flag_changes_the_plan(flags: dict[str, Any], changed: str) -> None:
    assert as_json(capacity(**flags))[changed] != as_json(capacity())[changed]


def test_more_sequences_are_suggested_where_memory_holds_them() -> None:
    plan = capacity("llama-3.2-1b")
    assert plan.suggested_flags() == {"--max-num-seqs": 256}
    assert capacity("llama-3.2-1b", max_num_seqs=256).suggested_flags() == {}


def test_what_does_not_fit_is_planned_and_refused_and_the_suggested_flags_fit() -> None:
    plan = capacity(gpu="rtx-4090")
    assert plan.plan is None
    assert plan.refusal is not None
    assert "Out of memory: one sequence of 131072 tokens needs a KV cache of 16.00 GiB" in plan.refusal
    flags = plan.suggested_flags()
    assert set(flags) == {"--max-model-len", "--max-num-seqs"}
    names = {name[2:].replace("-", "_"): value for name, value in flags.items()}
    fitting = capacity(gpu="rtx-4090", **names)
    assert fitting.plan is not None
    assert fitting.plan.max_model_len == plan.longest_context == flags["--max-model-len"]
    assert fitting.suggested_flags() == {}


def test_weights_larger_than_the_card_leave_no_flag_to_suggest() -> None:
    plan = capacity(gpu="8GiB")
    assert plan.refusal is not None
    assert "smaller model or a larger device" in plan.refusal
    assert plan.suggested_flags() == {}
    assert as_json(plan)["kv_cache_bytes"] == plan.longest_context == 0
    assert set(plan.concurrency().values()) == {0}


def test_text_says_what_is_assumed_and_what_is_estimated() -> None:
    text = as_text(capacity())
    assert f"CUDA graphs      {ASSUMED_GRAPH_BYTES / GIB:>9.2f} GiB  assumed, not measured" in text
    assert "largest step" in text
    assert text.count("estimated, ") == 2
    assert "128.0 KiB a token in bfloat16" in text
    assert "weights              14.96 GiB" in text
    assert "CUDA graphs           0.00 GiB  none" in as_text(capacity(enforce_eager=True))


def test_text_of_what_does_not_fit_says_so_and_suggests() -> None:
    text = as_text(capacity(gpu="24GiB"))
    assert "\nDoes not fit. Out of memory" in text
    assert "\nsuggested flags: --max-model-len " in text


def test_folders_and_gguf_files_are_planned_from_their_headers(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    for path in (folder, write_small_llama(tmp_path / "m.gguf")):
        plan = plan_capacity(EngineConfig(model=str(path)), PlanConfig(gpu="l4"))
        assert plan.plan is not None
        assert plan.dtype.itemsize == 2


def test_a_cpu_and_a_context_the_model_has_not_are_refused() -> None:
    with pytest.raises(ConfigError, match="--device cpu"):
        capacity(device="cpu")
    with pytest.raises(ConfigError, match="--max-model-len 200000 is longer than the model's context"):
        capacity(max_model_len=200000)
    with pytest.raises(CheckpointError, match="no such file"):
        capacity("llama-9")


# -- the command ----------------------------------------------------------------------------------


def test_command_prints_json_of_its_plan(capsys: pytest.CaptureFixture[str]) -> None:
    model = str(SHAPES / "qwen3-0.6b.json")
    assert cli.main(["plan", "--model", model, "--gpu", "l4", "--json", "--max-num-seqs", "8"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == as_json(capacity("qwen3-0.6b", "l4", max_num_seqs=8)) | {"model": model}
    assert printed["fits"] is True


def test_command_exits_with_2_after_a_plan_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", str(SHAPES / "llama-3.1-8b.json"), "--gpu", "rtx 3090"]) == 2
    out, err = capsys.readouterr()
    assert "Does not fit." in out
    assert err == ""


def test_command_names_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--gpu", "h100", "--model", "none.json"]) == 1
    assert capsys.readouterr().err.startswith("graphllm: error: none.json: no such file or folder, and not a")


def test_planning_starts_no_cuda_and_opens_no_weights() -> None:
    script = (
        "import sys, torch\n"
        "def refuse(*arguments, **keywords): raise AssertionError('CUDA was touched')\n"
        "torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = refuse\n"
        "from graphllm.cli import main\n"
        f"code = main(['plan', '--gpu', 'h100', '--model', {str(SHAPES / 'llama-3.1-8b.json')!r}])\n"
        "servers = {'uvloop', 'httptools', 'graphllm.runner.device', 'graphllm.engine.engine'}\n"
        "sys.exit(f'imported {servers & set(sys.modules)}' if servers & set(sys.modules) else code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert dataclasses.is_dataclass(CapacityPlan)
