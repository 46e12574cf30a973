"""Measures which kernel computes each linear layer of a few rows, and writes the table that the engine asks.

    python -m benchmarks.gpu.tune_linear --shapes llama-3.2-1b

For the layers of the models in `benchmarks/shapes/` and 1 to 16 rows, cuBLAS and every configuration of
`candidate_configs` multiply inside CUDA graphs, over so many copies of the weights that the cache never
has them, in turn, and the least time of each counts. A configuration whose result is off, or that does not
fit the card, is out. What was measured replaces what the table had for the same card and product; the rest
stays. With OUT set a copy of the table is written to that folder.

Owns the comparison. The table's form and the configurations are `graphllm/kernels/linear_choice.py`'s.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.command import empty_device_cache
from benchmarks.gpu.results import OUTPUT_VARIABLE, provenance
from benchmarks.gpu.timing import captured, time_on_device
from graphllm.kernels import linear_choice
from graphllm.kernels.gated_activation import gated_activation
from graphllm.kernels.gated_linear import gated_linear
from graphllm.kernels.linear import linear_ref
from graphllm.kernels.linear_choice import (
    EMPTY_TABLE,
    ROW_BUCKETS,
    Capability,
    Choice,
    ChoiceKey,
    LinearTable,
    Operation,
    SkinnyConfig,
    candidate_configs,
    capability_of,
    choose_linear,
    format_table,
    parse_table,
)
from graphllm.kernels.skinny_linear import skinny_linear, skinny_num_counters, skinny_scratch_bytes

SHAPES_FOLDER = Path(__file__).resolve().parents[1] / "shapes"
TABLE_PATH = Path(linear_choice.__file__).with_name("linear_choices.json")

CLEAR_WIN = 0.98
"""A kernel of ours has to take at most this part of the other side's time: noise must not choose."""

_DTYPE = torch.bfloat16
# Between two uses of the same copy of the weights, so many times the cache's size went through it.
_CACHES_BETWEEN = 4
# Launches of a graph: many, so that a replay's own time does not count, but no more than so many bytes.
_MIN_LAUNCHES = 200
_MAX_BYTES_A_GRAPH = 8 * 1024**3
_REPLAYS = 2

Launch = Callable[[Tensor], Any]
"""Launches one product with the given copy of the weights."""


@dataclass(frozen=True, slots=True)
class Product:
    """A layer of some model. out_features of "gated_linear" are half the rows of its weight."""

    name: str
    operation: Operation
    out_features: int
    in_features: int
    writes_float32: bool = False

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.out_features * (2 if self.operation == "gated_linear" else 1), self.in_features


def products_of(config: Mapping[str, Any]) -> list[Product]:
    """The products of a dense decoder, from its Hugging Face config; what others build on comes first."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // num_heads
    return [
        Product("qkv", "linear", (num_heads + 2 * num_kv_heads) * head_dim, hidden),
        Product("output", "linear", hidden, num_heads * head_dim),
        Product("gate_up", "linear", 2 * intermediate, hidden),
        Product("down", "linear", hidden, intermediate),
        Product("head", "linear", config["vocab_size"], hidden, writes_float32=True),
        Product("gate_up_activation", "gated_linear", intermediate, hidden),
    ]


def read_products(shapes: Iterable[str]) -> list[Product]:
    """The products of the models of these names, each size once."""
    found: dict[tuple[Operation, int, int], Product] = {}
    for shape in shapes:
        config = json.loads((SHAPES_FOLDER / f"{shape}.json").read_text(encoding="utf-8"))
        for product in products_of(config):
            found.setdefault((product.operation, product.out_features, product.in_features), product)
    return list(found.values())


def choose_winner(ours: Mapping[SkinnyConfig, float], *, others: float, measured: str) -> Choice:
    """The fastest of our configurations if it clearly beats the other side. Times in microseconds."""
    best = min(ours, key=lambda config: ours[config], default=None)
    if best is None or ours[best] > CLEAR_WIN * others:
        return Choice(None, round(others, 3), round(others, 3), measured)
    return Choice(best, round(ours[best], 3), round(others, 3), measured)


def merge(
    table: LinearTable, choices: Mapping[ChoiceKey, Choice], *, run: str, facts: Mapping[str, str]
) -> LinearTable:
    """The table with `choices` in place of what it had for the same keys, and no run that is not needed."""
    merged = {**table.choices, **choices}
    runs = {**table.provenance, run: facts}
    needed = {choice.measured for choice in merged.values()}
    return LinearTable(merged, {name: facts for name, facts in runs.items() if name in needed})


def num_copies(weight_bytes: int, *, cache_bytes: int) -> int:
    """Copies of the weights such that the cache has forgotten each when its turn comes again."""
    return max(1, math.ceil(_CACHES_BETWEEN * cache_bytes / weight_bytes) + 1)


def num_launches(copies: int, weight_bytes: int) -> int:
    """Products of one graph: whole rounds over the copies."""
    wanted = min(_MIN_LAUNCHES, max(1, _MAX_BYTES_A_GRAPH // weight_bytes))
    return copies * max(1, wanted // copies)


class Bench:
    """The operands of one product at one number of rows, and launches of everything that computes it."""

    def __init__(self, product: Product, num_rows: int, *, copies: int, device: torch.device) -> None:
        self.product, self.num_rows = product, num_rows
        torch.manual_seed(0)
        scale = product.in_features**-0.5
        one = torch.empty(product.weight_shape, dtype=_DTYPE, device=device).normal_(std=scale)
        self.weights = [one, *(one.clone() for _ in range(copies - 1))]
        self.x = torch.randn(num_rows, product.in_features, device=device).to(_DTYPE)
        out_dtype = torch.float32 if product.writes_float32 else _DTYPE
        self.out = torch.empty(num_rows, product.out_features, dtype=out_dtype, device=device)
        self.wide = torch.empty(num_rows, product.weight_shape[0], dtype=out_dtype, device=device)

    def other(self, table: LinearTable) -> Launch:
        """What the engine would do without our kernel; gated: with the best product that is known."""
        if self.product.operation == "linear":
            return lambda weight: linear_ref(self.x, weight, None, self.out)
        config = choose_linear(
            self.num_rows,
            *self.product.weight_shape,
            dtype=_DTYPE,
            capability=capability_of(self.x.device),
            table=table,
        )
        product = self._skinny(config, self.wide) if config is not None else self._cublas_wide

        def launch(weight: Tensor) -> None:
            product(weight)
            gated_activation(self.wide, "silu", out=self.out)

        return launch

    def ours(self, config: SkinnyConfig) -> Launch:
        if self.product.operation == "linear":
            return self._skinny(config, self.out)
        return lambda weight: gated_linear(self.x, weight, None, "silu", out=self.out, config=config)

    def _cublas_wide(self, weight: Tensor) -> Tensor:
        return linear_ref(self.x, weight, None, self.wide)

    def _skinny(self, config: SkinnyConfig, out: Tensor) -> Launch:
        num_bytes = skinny_scratch_bytes(self.num_rows, out.shape[1], config)
        num_counters = skinny_num_counters(out.shape[1], config)
        partials = torch.empty(num_bytes // 4, dtype=torch.float32, device=out.device)
        counters = torch.zeros(num_counters, dtype=torch.int32, device=out.device)
        return lambda weight: skinny_linear(
            self.x, weight, None, out, config=config, partials=partials, counters=counters
        )

    def result(self, launch: Launch) -> Tensor:
        """What a launch makes of the first copy, in a tensor of its own."""
        self.out.fill_(math.nan)
        launch(self.weights[0])
        return self.out.to(torch.float32, copy=True)

    def captured(self, launch: Launch) -> Contestant:
        """Launches over all copies of the weights in turn."""
        launches = num_launches(len(self.weights), self.weights[0].nbytes)
        turns = itertools.cycle(self.weights)
        return Contestant(launch, captured(lambda: launch(next(turns)), repeats=launches), launches)


@dataclass(slots=True)
class Contestant:
    """A CUDA graph of num_launches products. `launch` keeps alive what the graph only has addresses of."""

    launch: Launch
    graph: Any
    num_launches: int
    microseconds: float = math.inf

    def take_turn(self) -> None:
        timing = time_on_device(self.graph.replay, repeats=_REPLAYS, groups=1)
        self.microseconds = min(self.microseconds, timing.least * 1e3 / self.num_launches)


def is_right(ours: Tensor, others: Tensor) -> bool:
    """Whether two results differ by no more than 16-bit rounding of values around one."""
    return bool(torch.isfinite(ours).all()) and torch.allclose(ours, others, rtol=3e-2, atol=3e-2)


def measure(
    product: Product, rows: int, *, table: LinearTable, rounds: int
) -> tuple[float, dict[SkinnyConfig, float]]:
    """Microseconds of the other side and of each of our configurations that ran and was right."""
    device = _device()
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    weight_bytes = math.prod(product.weight_shape) * _DTYPE.itemsize
    copies = num_copies(weight_bytes, cache_bytes=cache_bytes)
    bench = Bench(product, rows, copies=copies, device=device)
    launch = bench.other(table)
    expected = bench.result(launch)
    other, ours = bench.captured(launch), {}
    for config in _candidates(product, rows):
        launch = bench.ours(config)
        try:
            right = is_right(bench.result(launch), expected)
        except Exception as error:  # above all: more shared memory than this card has
            print(f"  out: {config}: {type(error).__name__}: {error}", flush=True)
            continue
        if right:
            ours[config] = bench.captured(launch)
        else:
            print(f"  out, its result is wrong: {config}", flush=True)
    for _ in range(rounds):
        for contestant in (other, *ours.values()):
            contestant.take_turn()
    return other.microseconds, {config: contestant.microseconds for config, contestant in ours.items()}


def _candidates(product: Product, rows: int) -> tuple[SkinnyConfig, ...]:
    return candidate_configs(
        product.operation, rows=rows, out_features=product.out_features, in_features=product.in_features
    )


def compile_all(products: Sequence[Product], rows: Sequence[int], *, num_processes: int) -> None:
    """Fill Triton's cache from several processes; what fails to compile fails again when it is measured."""
    work = {
        (product, config.rows_held(count), config): (product, count, config)
        for product in products
        for count in rows
        for config in _candidates(product, count)
    }
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        list(pool.map(_compile_one, work.values(), chunksize=4))


def _compile_one(work: tuple[Product, int, SkinnyConfig]) -> None:
    product, num_rows, config = work
    try:
        bench = _bench_of(product, num_rows)
        bench.ours(config)(bench.weights[0])
        torch.cuda.synchronize()
    except Exception as error:
        print(f"  {product.name} {config}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


@functools.lru_cache(maxsize=1)
def _bench_of(product: Product, num_rows: int) -> Bench:
    return Bench(product, num_rows, copies=1, device=_device())


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def tune(options: argparse.Namespace, *, capability: Capability) -> LinearTable:
    """Measure and write, product by product, so that an interrupted run leaves what it had."""
    products = read_products(options.shapes)
    if options.processes > 1:
        compile_all(products, options.rows, num_processes=options.processes)
    table = EMPTY_TABLE
    if options.output.exists():
        table = parse_table(options.output.read_text(encoding="utf-8"), source=str(options.output))
    run, facts = run_and_facts(capability)
    # Fused layers are compared with products that were measured before.
    for product in sorted(products, key=lambda product: product.operation == "gated_linear"):
        choices = {}
        for rows in options.rows:
            others, ours = measure(product, rows, table=table, rounds=options.rounds)
            choice = choose_winner(ours, others=others, measured=run)
            dtype = linear_choice.dtype_name(_DTYPE)
            key = ChoiceKey(
                capability, product.operation, dtype, product.out_features, product.in_features, rows
            )
            choices[key] = choice
            print(as_text(product, rows, choice, ours), flush=True)
            empty_device_cache()
        table = merge(table, choices, run=run, facts=facts)
        write(table, options.output)
    return table


def run_and_facts(capability: Capability) -> tuple[str, dict[str, str]]:
    """The name of this run in the table, and what the table says of it."""
    machine = provenance()
    date = time.strftime("%Y-%m-%d", time.gmtime())
    facts = {
        "card": machine.device,
        "capability": ".".join(map(str, capability)),
        "driver": machine.driver,
        "torch": machine.torch,
        "triton": machine.triton,
        "commit": None if machine.commit is None else machine.commit + (" dirty" if machine.dirty else ""),
        "date": date,
    }
    known = {name: fact or "unknown" for name, fact in facts.items()}
    return f"{known['card']}, {date}, {known['commit']}", known


def as_text(product: Product, rows: int, choice: Choice, ours: Mapping[SkinnyConfig, float]) -> str:
    """One line for somebody who watches."""
    out_features, in_features = product.weight_shape
    rate = out_features * in_features * _DTYPE.itemsize / choice.microseconds / 1e6
    best = min(ours, key=lambda config: ours[config], default=None)
    second = "none of ours ran" if best is None else f"best of ours {ours[best]:.2f} us: {best}"
    winner = "cuBLAS" if choice.config is None else "ours"
    return (
        f"{product.name} {out_features}x{in_features}, {rows} rows: {winner} at {rate:.2f} TB/s; "
        f"without ours {choice.cublas_microseconds:.2f} us, {second}"
    )


def write(table: LinearTable, path: Path) -> None:
    """The table to `path`, and a copy to the folder that OUT names."""
    text = format_table(table)
    paths = [path]
    if folder := os.environ.get(OUTPUT_VARIABLE):
        paths.append(Path(folder) / path.name)
    for target in paths:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    shapes = sorted(path.stem for path in SHAPES_FOLDER.glob("*.json"))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.tune_linear", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=shapes, help="models (all)")
    parser.add_argument("--rows", nargs="+", type=int, choices=ROW_BUCKETS, default=list(ROW_BUCKETS))
    parser.add_argument("--rounds", type=int, default=5, help="times that each candidate has its turn")
    parser.add_argument("--output", type=Path, default=TABLE_PATH, help="the table to add to")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="that compile; 1 compiles as it goes"
    )
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"tune_linear needs a CUDA device, and torch {torch.__version__} sees none.", file=sys.stderr)
        return 1
    with torch.inference_mode():
        tune(options, capability=capability_of(_device()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
