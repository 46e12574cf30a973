"""Compiles every launch of a table of cases and prints the rows: the work of the ahead-of-time test.

    python -m tests.aot.build --write             refresh benchmarks/results/kernels-aot.md
    python -m tests.aot.build --output rows.jsonl

A process of its own, because it pretends that a card is there; never one that interprets kernels.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import time
from pathlib import Path

from tests.aot.compiling import Row, measure
from tests.aot.recording import Launch, record
from tests.aot.table import TABLE, to_markdown

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT_CACHE = REPOSITORY / ".pytest_cache" / "d" / "kernels-aot"
NUM_WORKERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="tests.aot.cases", help="the module whose CASES are driven")
    parser.add_argument("--only", default="", help="only kernels with this in their name")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--output", type=Path, help="a file for the rows, a JSON line each")
    parser.add_argument("--write", action="store_true", help="write the tracked table")
    options = parser.parse_args()
    start = time.monotonic()
    launches = [
        launch
        for launch in record(importlib.import_module(options.cases).CASES)
        if options.only in launch.name
    ]
    recorded = time.monotonic()
    rows = measure_all(launches, options.cache)
    print(f"{len(rows)} compilations: recorded in {recorded - start:.1f} s", end=", ")
    print(f"measured in {time.monotonic() - recorded:.1f} s")
    if options.output:
        options.output.write_text("".join(f"{row.to_json()}\n" for row in rows), encoding="utf-8")
    elif not options.write:
        print(to_markdown(rows))
    if options.write:
        TABLE.write_text(to_markdown(rows), encoding="utf-8")


def measure_all(launches: list[Launch], cache: Path) -> list[Row]:
    """Rows in the order of the table. Forked workers, since what is recorded cannot be sent."""
    # Products and attention take the longest to compile, so they go first.
    by_cost = sorted(launches, key=lambda launch: "dot(" not in launch.kernel.src)
    context = multiprocessing.get_context("fork")
    with context.Pool(NUM_WORKERS, initializer=_start_worker, initargs=(by_cost, cache)) as pool:
        rows = list(pool.imap_unordered(_measure_number, range(len(by_cost))))
    return sorted(rows, key=lambda row: row.key)


_work: tuple[list[Launch], Path]


def _start_worker(launches: list[Launch], cache: Path) -> None:
    global _work
    _work = launches, cache


def _measure_number(number: int) -> Row:
    launches, cache = _work
    try:
        return measure(launches[number], cache)
    except Exception as error:
        launch = launches[number]
        where = f"{launch.name} ({launch.configuration}) for cc {launch.capability / 10}"
        raise RuntimeError(f"{where} does not compile: {error}") from error


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") != "1", "kernels are interpreted in this process"
    main()
