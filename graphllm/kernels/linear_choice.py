"""Which kernel computes a linear layer of a few rows on a card: a table that was measured, never a guess.

Owns the table (`linear_choices.json` beside this file), how it is read and checked, and the configurations
that may stand in it. Multiplies nothing, and measures nothing: `benchmarks/gpu/tune_linear.py` does.

What the table does not list exactly (card, dtype, rows, shape) goes to cuBLAS. There is no nearest shape:
the same split wins by 40 % on one shape and loses by a factor of four on another.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

Operation = Literal["linear", "gated_linear"]
Form = Literal["gemv", "dot"]
Capability = tuple[int, int]

ROW_BUCKETS = (1, 2, 4, 8, 16)
MAX_ROWS = ROW_BUCKETS[-1]
MAX_GEMV_ROWS = 4
"""Above this the multiply-adds of CUDA cores would cost more than the weights' way from memory."""
DOT_ROWS = 16
"""Rows of the smallest product that the matrix units do."""
MAX_SPLITS = 8

TABLE_VARIABLE = "GRAPHLLM_LINEAR_CHOICES"
"""Environment variable: the path of a table to use in place of the one that is shipped."""

_TABLE_PATH = Path(__file__).with_name("linear_choices.json")
_FORMAT = 1
_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class SkinnyConfig:
    """How `skinny_linear` and `gated_linear` cut their work.

    form: "gemv" multiplies and adds on CUDA cores, for at most MAX_GEMV_ROWS rows; "dot" on matrix units,
    for at most 16. block_n, block_k: output columns of a program (of `gated_linear`: half as many rows of
    weights again) and input features of a step of its loop, powers of two. splits: programs that share a
    sum over the input features. num_stages: tiles of weights in flight; 1 loads them when needed.
    """

    form: Form
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise ValueError(f"form is {self.form!r}, not one of {get_args(Form)}")
        limits = {
            "block_n": (1 if self.form == "gemv" else 8, 256),
            "block_k": (16, 4096),
            "num_warps": (1, 16),
        }
        for name, (lowest, highest) in limits.items():
            value = getattr(self, name)
            if not _is_int(value) or not lowest <= value <= highest or value & (value - 1):
                raise ValueError(f"{name} is {value!r}, not a power of two from {lowest} to {highest}")
        for name, highest in {"splits": MAX_SPLITS, "num_stages": 8}.items():
            value = getattr(self, name)
            if not _is_int(value) or not 1 <= value <= highest:
                raise ValueError(f"{name} is {value!r}, not from 1 to {highest}")

    @property
    def max_rows(self) -> int:
        return MAX_GEMV_ROWS if self.form == "gemv" else MAX_ROWS

    def rows_held(self, num_rows: int) -> int:
        """Rows that a program computes, padding included: a power of two."""
        return DOT_ROWS if self.form == "dot" else row_bucket(num_rows)


@dataclass(frozen=True, slots=True, order=True)
class ChoiceKey:
    """What an entry of the table is about. rows is a bucket: 3 rows ask for 4.

    out_features of "gated_linear" are the intermediate size, half the rows of its weight.
    """

    capability: Capability
    operation: Operation
    dtype: str
    out_features: int
    in_features: int
    rows: int


@dataclass(frozen=True, slots=True)
class Choice:
    """One measurement. config None: cuBLAS was as fast.

    microseconds: of the kernel chosen; cublas_microseconds: of cuBLAS in the same run (for "gated_linear"
    of the best unfused product followed by the activation). measured: a key of the table's provenance.
    """

    config: SkinnyConfig | None
    microseconds: float
    cublas_microseconds: float
    measured: str


@dataclass(frozen=True, slots=True)
class LinearTable:
    """All measurements; provenance says of each run the card, versions, commit and date."""

    choices: Mapping[ChoiceKey, Choice]
    provenance: Mapping[str, Mapping[str, str]]


EMPTY_TABLE = LinearTable({}, {})


def row_bucket(num_rows: int) -> int:
    """The smallest of ROW_BUCKETS that holds num_rows, which is from 1 to MAX_ROWS."""
    return next(rows for rows in ROW_BUCKETS if rows >= num_rows)


def choose_linear(
    num_rows: int,
    out_features: int,
    in_features: int,
    *,
    dtype: torch.dtype,
    capability: Capability,
    table: LinearTable | None = None,
) -> SkinnyConfig | None:
    """The configuration of `skinny_linear` for this product, or None: cuBLAS. table None: the default."""
    return _choose("linear", num_rows, out_features, in_features, dtype, capability, table)


def choose_gated_linear(
    num_rows: int,
    intermediate_size: int,
    in_features: int,
    *,
    dtype: torch.dtype,
    capability: Capability,
    table: LinearTable | None = None,
) -> SkinnyConfig | None:
    """The configuration of `gated_linear`, or None: a product and an activation, as two kernels."""
    return _choose("gated_linear", num_rows, intermediate_size, in_features, dtype, capability, table)


def _choose(
    operation: Operation,
    num_rows: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    capability: Capability,
    table: LinearTable | None,
) -> SkinnyConfig | None:
    table = default_table() if table is None else table
    if not table.choices or not 1 <= num_rows <= MAX_ROWS:
        return None
    rows = row_bucket(num_rows)
    key = ChoiceKey(capability, operation, dtype_name(dtype), out_features, in_features, rows)
    choice = table.choices.get(key)
    return None if choice is None else choice.config


# Enough for eight programs on each multiprocessor of a large card; too few to fill half of one.
_ENOUGH_PROGRAMS = 1024
_TOO_FEW_PROGRAMS = 64


def candidate_configs(
    operation: Operation, *, rows: int, out_features: int, in_features: int
) -> tuple[SkinnyConfig, ...]:
    """Every configuration that is worth a measurement for a product of 16-bit numbers, in a fixed order.

    Nothing else gets into the table, so this is also what has to compile well.
    """
    # A program of gated_linear has twice as many rows of weights.
    widths = (2, 4, 8) if operation == "linear" else (1, 2, 4)
    tiles: list[tuple[Form, int, int, int, int]] = []
    if rows <= MAX_GEMV_ROWS:
        # 128-bit loads: eight numbers a thread.
        tiles += [("gemv", width, 256 * warps, warps, 3) for width in widths for warps in (2, 4)]
    if rows >= MAX_GEMV_ROWS:
        tiles += [("dot", 8 * width, block_k, 4, 4) for width in widths for block_k in (128, 256)]
    configs = []
    for form, block_n, block_k, num_warps, num_stages in tiles:
        num_groups = -(-out_features // block_n)
        for splits in (1, 2, 4, 8) if operation == "linear" else (1,):
            num_tiles = -(-in_features // (splits * block_k))
            is_too_much = splits > 1 and num_groups * splits > _ENOUGH_PROGRAMS
            is_empty = (splits - 1) * num_tiles * block_k >= in_features
            if is_too_much or is_empty or num_groups * splits < _TOO_FEW_PROGRAMS:
                continue
            # One tile is loaded ahead whatever the depth, so a loop of one step has nothing to overlap.
            stages = num_stages if num_tiles > 2 else 1
            configs.append(SkinnyConfig(form, block_n, block_k, splits, num_warps, stages))
    return tuple(configs)


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def capability_of(device: torch.device) -> Capability:
    """The compute capability of a CUDA device; (0, 0), which no table lists, of any other."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def table_path() -> Path:
    """The table that is shipped, or the one that TABLE_VARIABLE names."""
    return Path(os.environ.get(TABLE_VARIABLE) or _TABLE_PATH)


@functools.cache
def default_table() -> LinearTable:
    """The table in force; read once a process."""
    path = table_path()
    return parse_table(path.read_text(encoding="utf-8"), source=str(path))


def parse_table(text: str, *, source: str) -> LinearTable:
    """Read a table; ValueError names `source` and the entry at fault, by its number from 0."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not JSON: {error}") from None
    if not isinstance(data, dict) or data.keys() != {"format", "provenance", "entries"}:
        raise ValueError(f"{source} has not exactly the keys format, provenance and entries")
    if data["format"] != _FORMAT:
        raise ValueError(f"{source} has format {data['format']!r}; this version reads {_FORMAT}")
    provenance, entries = data["provenance"], data["entries"]
    if not isinstance(provenance, dict) or not all(isinstance(run, dict) for run in provenance.values()):
        raise ValueError(f"{source}: provenance is not an object of objects")
    if not isinstance(entries, list):
        raise ValueError(f"{source}: entries is not a list")
    choices: dict[ChoiceKey, Choice] = {}
    for number, entry in enumerate(entries):
        try:
            key, choice = _parse_entry(entry)
            if choice.measured not in provenance:
                raise ValueError(f"no run is called {choice.measured!r}")
            if key in choices:
                raise ValueError("the same product has an entry already")
        except ValueError as error:
            raise ValueError(f"{source}: entry {number}: {error}; it is {json.dumps(entry)}") from None
        choices[key] = choice
    return LinearTable(choices, provenance)


_ENTRY_KEYS = {
    *(field.name for field in fields(ChoiceKey)),
    *(field.name for field in fields(Choice)),
}


def _parse_entry(entry: object) -> tuple[ChoiceKey, Choice]:
    if not isinstance(entry, dict):
        raise ValueError("not an object")
    if entry.keys() != _ENTRY_KEYS:
        raise ValueError(f"keys missing or unknown: {sorted(entry.keys() ^ _ENTRY_KEYS)}")
    for name, allowed in (("operation", get_args(Operation)), ("dtype", _DTYPES), ("rows", ROW_BUCKETS)):
        if entry[name] not in allowed or isinstance(entry[name], bool):
            raise ValueError(f"{name} is {entry[name]!r}, not one of {allowed}")
    for name in ("out_features", "in_features"):
        if not _is_int(entry[name]) or entry[name] < 1:
            raise ValueError(f"{name} is {entry[name]!r}, not a positive integer")
    for name in ("microseconds", "cublas_microseconds"):
        if not isinstance(entry[name], int | float) or not 0 < entry[name] < float("inf"):
            raise ValueError(f"{name} is {entry[name]!r}, not a positive number")
    key = ChoiceKey(
        _parse_capability(entry["capability"]),
        entry["operation"],
        entry["dtype"],
        entry["out_features"],
        entry["in_features"],
        entry["rows"],
    )
    config = None if entry["config"] is None else _parse_config(entry["config"])
    if config is not None and config.max_rows < key.rows:
        raise ValueError(f"form {config.form!r} takes at most {config.max_rows} rows")
    if config is not None and key.operation == "gated_linear" and config.splits != 1:
        raise ValueError("gated_linear cannot split its sums")
    return key, Choice(config, entry["microseconds"], entry["cublas_microseconds"], str(entry["measured"]))


def _parse_capability(value: object) -> Capability:
    major, dot, minor = value.partition(".") if isinstance(value, str) else ("", "", "")
    if not (dot and major.isdecimal() and minor.isdecimal()):
        raise ValueError(f'capability is {value!r}, not like "9.0"')
    return int(major), int(minor)


def _parse_config(config: object) -> SkinnyConfig:
    names = {field.name for field in fields(SkinnyConfig)}
    if not isinstance(config, dict) or config.keys() != names:
        raise ValueError(f"config has not exactly the keys {sorted(names)}")
    return SkinnyConfig(**cast("dict[str, Any]", config))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def format_table(table: LinearTable) -> str:
    """The table as text: sorted, one entry a line, the same text for the same measurements."""
    entries = [_format_entry(key, table.choices[key]) for key in sorted(table.choices)]
    runs = [f"{json.dumps(name)}: {json.dumps(table.provenance[name])}" for name in sorted(table.provenance)]
    return (
        f'{{\n"format": {_FORMAT},\n"provenance": {{{_lines(runs)}}},\n"entries": [{_lines(entries)}]\n}}\n'
    )


def _format_entry(key: ChoiceKey, choice: Choice) -> str:
    entry: dict[str, Any] = asdict(key) | asdict(choice)
    entry["capability"] = f"{key.capability[0]}.{key.capability[1]}"
    return json.dumps(entry)


def _lines(items: list[str]) -> str:
    return "\n" + ",\n".join(items) + "\n" if items else ""
