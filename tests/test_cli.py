"""The command line: every config field is a flag, and mistakes are one line and an exit code."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import types
from collections.abc import Callable

import pytest

import graphllm
from graphllm import cli
from graphllm.config import EngineConfig, PlanConfig, ServerConfig
from graphllm.errors import CheckpointError, ConfigError

FIELDS = [(config, field) for config in (EngineConfig, ServerConfig) for field in dataclasses.fields(config)]
# A value other than the default, for every field; a new field has to be added here.
OTHER_VALUES = {
    "tool_call_parser": ("hermes", "hermes"),
    "reasoning_parser": ("none", "none"),
    "api_key": ("secret", "secret"),
    "block_size": ("32", 32),
    "cpu_threads": ("3", 3),
    "cudagraph_capture_sizes": ("1,2,4", (1, 2, 4)),
    "matryoshka_dimensions": ("64,32", (64, 32)),
    "device": ("cpu", "cpu"),
    "drain_timeout": ("1.5", 1.5),
    "dtype": ("bfloat16", "bfloat16"),
    "lora_modules": ("a=/b", ("a=/b",)),
    "max_cpu_loras": ("9", 9),
    "max_lora_rank": ("32", 32),
    "max_loras": ("3", 3),
    "gguf_file": ("m-Q8_0.gguf", "m-Q8_0.gguf"),
    "gpu_memory_utilization": ("0.5", 0.5),
    "host": ("0.0.0.0", "0.0.0.0"),
    "kv_cache_memory_bytes": ("1.5GiB", 3 * 2**29),
    "kv_cache_dtype": ("int8", "int8"),
    "kv_offloading_size": ("1.5", 1.5),
    "load_format": ("dummy", "dummy"),
    "model_impl": ("transformers", "transformers"),
    "quantization": ("int8", "int8"),
    "revision": ("refs/pr/1", "refs/pr/1"),
    "log_level": ("debug", "debug"),
    "max_body_bytes": ("10MB", 10_000_000),
    "max_model_len": ("512", 512),
    "max_num_batched_tokens": ("128", 128),
    "max_num_seqs": ("8", 8),
    "max_pinned_share": ("0.5", 0.5),
    "max_stored_responses": ("0", 0),
    "model": ("some/folder", "some/folder"),
    "pin_prefix": ("prompt.txt", ("prompt.txt",)),
    "port": ("0", 0),
    "response_store_size": ("10MB", 10_000_000),
    "response_ttl": ("60", 60.0),
    "seed": ("-7", -7),
    "served_model_name": ("org/name", "org/name"),
    "swap_space": ("2", 2.0),
}


def parse(*arguments: str) -> tuple[EngineConfig, ServerConfig]:
    return cli.parse_configs(list(arguments))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "graphllm", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def install_server(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., int]], None]:
    """Stand `serve` in for the server's: these tests are about what comes before and after it."""

    def install(serve: Callable[..., int]) -> None:
        module = types.ModuleType("graphllm.server.app")
        module.serve = serve  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "graphllm.server.app", module)

    return install


def test_no_arguments_give_the_configs_defaults() -> None:
    assert parse() == (EngineConfig(), ServerConfig())


def test_serve_is_the_default_command() -> None:
    assert parse("serve", "--port", "1") == parse("--port", "1")


@pytest.mark.parametrize(("config", "field"), FIELDS, ids=lambda value: getattr(value, "name", ""))
def test_every_field_has_a_flag_that_sets_it_and_nothing_else(
    config: type[EngineConfig] | type[ServerConfig], field: dataclasses.Field[object]
) -> None:
    flag = "--" + field.name.replace("_", "-")
    if isinstance(field.default, bool):
        arguments, value = ["--no-" + flag[2:] if field.default else flag], not field.default
    else:
        text, value = OTHER_VALUES[field.name]
        arguments = [flag, text]
    assert value != field.default
    built = dict(zip((EngineConfig, ServerConfig), parse(*arguments), strict=True))
    assert built[config] == config(**{field.name: value})
    for other in {EngineConfig, ServerConfig} - {config}:
        assert built[other] == other()


def test_a_switch_can_be_named_in_both_directions() -> None:
    assert parse("--look-ahead")[0].look_ahead is True
    assert parse("--no-look-ahead")[0].look_ahead is False


def test_plan_takes_the_engine_s_flags_and_its_own() -> None:
    found = cli.parse_plan_configs(["--gpu", "l4", "--json", "--model", "m", "--max-num-seqs", "8"])
    assert found == (EngineConfig(model="m", max_num_seqs=8), PlanConfig(gpu="l4", json=True))
    text = " ".join(cli.build_plan_parser().format_help().split())
    assert "graphllm plan --gpu CARD [options]" in text
    for config in (EngineConfig, PlanConfig):
        for field in dataclasses.fields(config):
            assert field.metadata["help"] in text
    assert "--port" not in text
    assert "graphllm plan --gpu CARD" in cli.build_parser().format_help()


def test_a_list_is_one_argument_or_several() -> None:
    for arguments in (["1", "2", "4"], ["1,2,4"], ["1 2 4"], ["1,2", "4"]):
        engine_config, server_config = parse("--cudagraph-capture-sizes", *arguments, "--port", "1")
        assert engine_config.cudagraph_capture_sizes == (1, 2, 4)
        assert server_config.port == 1


@pytest.mark.parametrize(("config", "field"), FIELDS, ids=lambda value: getattr(value, "name", ""))
def test_help_names_every_flag_with_its_help(
    config: type[EngineConfig], field: dataclasses.Field[object]
) -> None:
    text = " ".join(cli.build_parser().format_help().split())
    assert "--" + field.name.replace("_", "-") in text
    assert field.metadata["help"] in text


def test_help_shows_defaults() -> None:
    text = " ".join(cli.build_parser().format_help().split())
    assert "Port to listen on; 0 takes a free one. (default: 8000)" in text
    assert "Largest request body. (default: 32MiB)" in text
    assert "Most sequences in one step. (default: 64)" in text


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--port", "70000"], "--port must be between 0 and 65535, not 70000."),
        (["--port", "abc"], "argument --port: invalid int value: 'abc'"),
        (["--max-num-seqs", "0"], "--max-num-seqs must be at least 1, not 0."),
        (["--max-model-len", "-1"], "--max-model-len must be at least 1, not -1."),
        (["--kv-cache-memory-bytes", "2 cows"], "argument --kv-cache-memory-bytes: '2 cows' is not a size"),
        (
            ["--gpu-memory-utilization", "1.5"],
            "--gpu-memory-utilization must be above 0 and at most 1, not 1.5.",
        ),
        (
            ["--cudagraph-capture-sizes", "1", "two"],
            "argument --cudagraph-capture-sizes: 'two' is not a list of sizes",
        ),
        (["--cudagraph-capture-sizes"], "argument --cudagraph-capture-sizes: expected at least one argument"),
        (["--load-format", "gguf"], "argument --load-format: invalid choice: 'gguf'"),
        (["--block-size", "7"], "argument --block-size: invalid choice: 7"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--modle", "x"], "unrecognized arguments: --modle x"),
        (["--mod", "x"], "unrecognized arguments: --mod x"),
        (["--model"], "argument --model: expected one argument"),
        (["sevre"], "unrecognized arguments: sevre"),
        (["plan"], "--gpu is missing: name a card, for example h100, or its memory."),
        (["plan", "--gpu", "abacus"], "'abacus' is neither a card that is known"),
        (["plan", "--gpu", "l4", "--port", "1"], "unrecognized arguments: --port 1"),
        (["--gpu", "l4"], "unrecognized arguments: --gpu l4"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(arguments)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"graphllm: error: {complaint}")
    assert err.count("\n") == 1


def test_serve_gets_the_configs_and_its_exit_code_is_the_process_s(
    install_server: Callable[[Callable[..., int]], None],
) -> None:
    calls = []

    def serve(engine_config: EngineConfig, server_config: ServerConfig) -> int:
        calls.append((engine_config, server_config))
        return 3

    install_server(serve)
    assert cli.main(["--model", "m", "--port", "0"]) == 3
    assert calls == [(EngineConfig(model="m"), ServerConfig(port=0))]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CheckpointError("model.safetensors is truncated."), 1),
        (ConfigError("--device cuda: no CUDA here."), 2),
    ],
)
def test_an_error_at_start_is_one_line_without_a_traceback(
    error: Exception,
    code: int,
    install_server: Callable[[Callable[..., int]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def serve(engine_config: EngineConfig, server_config: ServerConfig) -> int:
        raise error

    install_server(serve)
    assert cli.main([]) == code
    assert capsys.readouterr().err == f"graphllm: error: {error}\n"


def test_a_bug_keeps_its_traceback(install_server: Callable[[Callable[..., int]], None]) -> None:
    def serve(engine_config: EngineConfig, server_config: ServerConfig) -> int:
        raise ZeroDivisionError

    install_server(serve)
    with pytest.raises(ZeroDivisionError):
        cli.main([])


def test_python_m_prints_the_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"graphllm {graphllm.__version__}\n", "")


def test_python_m_exits_with_2_for_a_mistake() -> None:
    done = run("--port", "x")
    assert done.returncode == 2
    assert done.stderr.startswith("graphllm: error: ")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["--port", "-1"], ["plan", "--help"]])
def test_quick_answers_do_not_wait_for_torch(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from graphllm.cli import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit:\n"
        "    pass\n"
        "loaded = {'numpy', 'torch', 'uvloop', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(f'imported {loaded}' if loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = "import sys, graphllm; sys.exit('torch' in sys.modules or 'graphllm.config' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_public_face_offers_what_it_names() -> None:
    from graphllm.sampling_params import SamplingParams

    assert graphllm.SamplingParams is SamplingParams
    assert set(graphllm.__all__) <= set(dir(graphllm))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = graphllm.nonsense
