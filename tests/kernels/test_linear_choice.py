from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from benchmarks.gpu import tune_linear
from benchmarks.gpu.tune_linear import (
    Product,
    choose_winner,
    merge,
    num_copies,
    num_launches,
    products_of,
    read_products,
)
from graphllm.kernels import linear_choice
from graphllm.kernels.linear_choice import (
    EMPTY_TABLE,
    MAX_GEMV_ROWS,
    ROW_BUCKETS,
    Choice,
    ChoiceKey,
    LinearTable,
    Operation,
    SkinnyConfig,
    candidate_configs,
    choose_gated_linear,
    choose_linear,
    default_table,
    format_table,
    parse_table,
)

H100 = (9, 0)
GEMV = SkinnyConfig("gemv", 4, 1024, 2, num_warps=4, num_stages=3)
DOT = SkinnyConfig("dot", 32, 128, 1, num_warps=4, num_stages=4)
SHIPPED = Path(linear_choice.__file__).with_name("linear_choices.json")


def key(rows: int, **changes: Any) -> ChoiceKey:
    values = {
        "capability": H100,
        "operation": "linear",
        "dtype": "bfloat16",
        "out_features": 3072,
        "in_features": 2048,
    }
    return ChoiceKey(**values | changes, rows=rows)


TABLE = LinearTable(
    {
        key(1): Choice(GEMV, 4.25, 5.5, "a run"),
        key(8): Choice(DOT, 4.5, 5.0, "a run"),
        key(16): Choice(None, 5.0, 5.0, "a run"),
        key(1, operation="gated_linear", out_features=8192): Choice(DOT, 9.0, 12.0, "a run"),
    },
    {"a run": {"card": "NVIDIA H100", "date": "2026-11-24"}},
)


def choose(num_rows: int, out_features: int = 3072, in_features: int = 2048, **changes: Any) -> Any:
    values = {"dtype": torch.bfloat16, "capability": H100, "table": TABLE} | changes
    return choose_linear(num_rows, out_features, in_features, **values)


def test_measured_product_takes_its_configuration() -> None:
    assert choose(1) == GEMV
    assert choose(8) == DOT


def test_rows_between_two_buckets_take_the_larger() -> None:
    assert [choose(rows) for rows in (5, 6, 7)] == [DOT] * 3


@pytest.mark.parametrize("num_rows", [0, 2, 3, 4, 9, 16, 17, 1000])
def test_rows_that_were_not_measured_or_where_cublas_won_take_cublas(num_rows: int) -> None:
    assert choose(num_rows) is None


def test_anything_else_that_was_not_measured_takes_cublas() -> None:
    assert choose(1, 3073) is None
    assert choose(1, 3072, 2049) is None
    assert choose(1, capability=(9, 1)) is None
    assert choose(1, dtype=torch.float16) is None
    assert choose(1, table=EMPTY_TABLE) is None


def test_gated_and_plain_products_are_chosen_apart() -> None:
    values: Any = {"dtype": torch.bfloat16, "capability": H100, "table": TABLE}
    assert choose_gated_linear(1, 8192, 2048, **values) == DOT
    assert choose_gated_linear(1, 3072, 2048, **values) is None
    assert choose(1, 8192) is None


def test_text_of_a_table_reads_back_and_does_not_depend_on_the_order_of_measurement() -> None:
    text = format_table(TABLE)
    assert parse_table(text, source="here") == TABLE
    backwards = LinearTable(dict(reversed(TABLE.choices.items())), TABLE.provenance)
    assert format_table(backwards) == text
    lines = [line for line in text.splitlines() if "microseconds" in line]
    assert len(lines) == len(TABLE.choices)


def test_shipped_table_is_in_its_canonical_form_and_has_nothing_that_was_not_measured() -> None:
    table = parse_table(SHIPPED.read_text(encoding="utf-8"), source=str(SHIPPED))
    assert format_table(table) == SHIPPED.read_text(encoding="utf-8")
    for entry, choice in table.choices.items():
        facts = table.provenance[choice.measured]
        assert {"card", "driver", "torch", "triton", "commit", "date"} <= facts.keys()
        candidates = candidate_configs(
            entry.operation, rows=entry.rows, out_features=entry.out_features, in_features=entry.in_features
        )
        assert choice.config is None or choice.config in candidates


def damaged(**changes: Any) -> str:
    """The table's text with the third entry changed; a value of ... removes its key."""
    data = json.loads(format_table(TABLE))
    entry = data["entries"][2]
    for name, value in changes.items():
        owner = entry["config"] if name in GEMV.__slots__ else entry
        owner[name] = value
        if value is ...:
            del owner[name]
    return json.dumps(data)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"capability": 9.0}, "capability is 9.0"),
        ({"capability": "9"}, "capability is '9'"),
        ({"operation": "convolution"}, "operation is 'convolution'"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"rows": 3}, "rows is 3"),
        ({"out_features": 0}, "out_features is 0"),
        ({"in_features": 2048.0}, r"in_features is 2048\.0"),
        ({"microseconds": -1}, "microseconds is -1"),
        ({"cublas_microseconds": "5"}, "cublas_microseconds is '5'"),
        ({"measured": "another run"}, "no run is called 'another run'"),
        ({"config": ...}, r"keys missing or unknown: \['config'\]"),
        ({"note": "fast"}, r"keys missing or unknown: \['note'\]"),
        ({"config": "fast"}, "config has not exactly the keys"),
        ({"form": "magic"}, "form is 'magic'"),
        ({"form": "gemv"}, "form 'gemv' takes at most 4 rows"),
        ({"block_n": 4}, "block_n is 4"),
        ({"block_k": 96}, "block_k is 96"),
        ({"splits": 9}, "splits is 9"),
        ({"num_warps": 3}, "num_warps is 3"),
        ({"num_stages": 0}, "num_stages is 0"),
        ({"num_stages": ...}, "config has not exactly the keys"),
        ({"operation": "gated_linear", "splits": 2}, "gated_linear cannot split"),
        ({"rows": 1}, "the same product has an entry already"),
    ],
)
def test_damaged_entry_is_named(changes: dict[str, Any], complaint: str) -> None:
    rows = [entry["rows"] for entry in json.loads(format_table(TABLE))["entries"]]
    assert rows == [1, 1, 8, 16]
    with pytest.raises(ValueError, match=rf"^table\.json: entry 2: {complaint}.*; it is \{{"):
        parse_table(damaged(**changes), source="table.json")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is not JSON"),
        ("[]", "has not exactly the keys"),
        ('{"format": 2, "provenance": {}, "entries": []}', "has format 2"),
        ('{"format": 1, "provenance": [], "entries": []}', "provenance is not an object"),
        ('{"format": 1, "provenance": {}, "entries": {}}', "entries is not a list"),
        ('{"format": 1, "provenance": {}, "entries": [3]}', "entry 0: not an object"),
    ],
)
def test_damaged_table_is_an_error_that_names_the_file(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=rf"^table\.json:? {complaint}"):
        parse_table(text, source="table.json")


def test_environment_names_a_table_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.json"
    path.write_text(format_table(TABLE), encoding="utf-8")
    try:
        default_table.cache_clear()
        monkeypatch.setenv(linear_choice.TABLE_VARIABLE, str(path))
        assert choose(1, table=None) == GEMV
        default_table.cache_clear()
        monkeypatch.delenv(linear_choice.TABLE_VARIABLE)
        assert default_table() == parse_table(SHIPPED.read_text(encoding="utf-8"), source=str(SHIPPED))
    finally:
        default_table.cache_clear()


LLAMA_1B = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 128256,
}


def test_products_are_those_of_the_model() -> None:
    shapes = {product.name: product.weight_shape for product in products_of(LLAMA_1B)}
    assert shapes == {
        "qkv": (3072, 2048),
        "output": (2048, 2048),
        "gate_up": (16384, 2048),
        "down": (2048, 8192),
        "head": (128256, 2048),
        "gate_up_activation": (16384, 2048),
    }
    heads = {product.name: product.weight_shape for product in products_of({**LLAMA_1B, "head_dim": 128})}
    assert heads["qkv"] == (6144, 2048) and heads["output"] == (2048, 4096)


def test_every_model_under_shapes_has_six_products_and_equal_sizes_are_measured_once() -> None:
    names = [path.stem for path in tune_linear.SHAPES_FOLDER.glob("*.json")]
    assert len(names) >= 3
    products = read_products(names)
    assert read_products([*names, *names]) == products
    assert len({(p.operation, p.out_features, p.in_features) for p in products}) == len(products)


@pytest.mark.parametrize("rows", ROW_BUCKETS)
@pytest.mark.parametrize("operation", get_args(Operation))
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(3072, 2048), (1024, 3072), (4096, 14336), (128256, 4096), (1536, 576)]
)
def test_candidates_fit_their_rows_fill_a_card_and_leave_no_split_empty(
    out_features: int, in_features: int, operation: Operation, rows: int
) -> None:
    configs = candidate_configs(operation, rows=rows, out_features=out_features, in_features=in_features)
    assert configs and len(set(configs)) == len(configs) <= 40
    for config in configs:
        assert config.max_rows >= rows
        assert config.splits == 1 or operation == "linear"
        assert -(-out_features // config.block_n) * config.splits >= 64
        num_tiles = -(-in_features // (config.splits * config.block_k))
        assert (config.splits - 1) * num_tiles * config.block_k < in_features
    forms = {config.form for config in configs}
    assert ("gemv" in forms) == (rows <= MAX_GEMV_ROWS) and ("dot" in forms) == (rows >= MAX_GEMV_ROWS)


def test_winner_has_to_win_clearly() -> None:
    times = {GEMV: 9.7, DOT: 9.9}
    assert choose_winner(times, others=10.0, measured="run") == Choice(GEMV, 9.7, 10.0, "run")
    assert choose_winner({DOT: 9.9}, others=10.0, measured="run") == Choice(None, 10.0, 10.0, "run")
    assert choose_winner({}, others=10.0, measured="run").config is None


def test_new_measurements_replace_old_ones_of_the_same_products_only() -> None:
    new = {key(1): Choice(None, 4.0, 4.0, "b run"), key(2): Choice(GEMV, 4.0, 5.0, "b run")}
    merged = merge(TABLE, new, run="b run", facts={"card": "another"})
    assert merged.choices == {**TABLE.choices, **new}
    assert merged.provenance == {**TABLE.provenance, "b run": {"card": "another"}}
    everything = {entry: Choice(None, 4.0, 4.0, "b run") for entry in merged.choices}
    assert merge(merged, everything, run="b run", facts={}).provenance.keys() == {"b run"}


@pytest.mark.parametrize("weight_bytes", [2 * 1024 * 2048, 2 * 3072 * 2048, 2 * 128256 * 4096])
def test_copies_outgrow_the_cache_and_a_graph_goes_whole_rounds(weight_bytes: int) -> None:
    cache_bytes = 50 * 1024**2
    copies = num_copies(weight_bytes, cache_bytes=cache_bytes)
    assert (copies - 1) * weight_bytes >= 4 * cache_bytes
    launches = num_launches(copies, weight_bytes)
    assert launches % copies == 0 and launches * weight_bytes <= 10 * 1024**3


def test_tuning_writes_after_each_product_and_adds_to_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables_seen = []

    def measure(
        product: Product, rows: int, *, table: LinearTable, rounds: int
    ) -> tuple[float, dict[Any, float]]:
        tables_seen.append(table)
        assert product.operation != "gated_linear" or len(table.choices) > 10
        if product.name == "gate_up_activation" and rows == 16:
            raise KeyboardInterrupt
        return 10.0, {GEMV if rows == 1 and product.operation == "linear" else DOT: 9.0 + rows / 10}

    monkeypatch.setattr(tune_linear, "measure", measure)
    monkeypatch.setenv(tune_linear.OUTPUT_VARIABLE, str(tmp_path / "out"))
    output = tmp_path / "table.json"
    old = key(1, capability=(8, 0))
    before = LinearTable({old: Choice(GEMV, 4.25, 5.5, "a run")}, TABLE.provenance)
    output.write_text(format_table(before), encoding="utf-8")
    options = argparse.Namespace(shapes=["llama-3.2-1b"], rows=[1, 16], rounds=1, output=output, processes=1)
    with pytest.raises(KeyboardInterrupt):
        tune_linear.tune(options, capability=H100)
    written = parse_table(output.read_text(encoding="utf-8"), source="written")
    assert (tmp_path / "out" / "table.json").read_text(encoding="utf-8") == format_table(written)
    assert len(written.choices) == 1 + 5 * 2 and written.choices[old] == before.choices[old]
    assert written.choices[key(1)].config == GEMV
    assert written.choices[key(16)].config is None
    facts = written.provenance[written.choices[key(1)].measured]
    assert facts["capability"] == "9.0" and facts["torch"].startswith(torch.__version__.split("+")[0])


def test_without_a_card_tuning_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune_linear.main([]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err
