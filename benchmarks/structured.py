"""What structured output costs: compiling, masks and steps, over ordinary schemas and hostile requests.

Everything runs on one thread, as it does on the event loop, and is measured in CPU time of that thread,
because a busy box would otherwise be what is measured.

    python -m benchmarks.structured [--vocab-size N] [--output]

Vocabularies larger than the demo model's are its tokens and joined pairs of them. The schemas and the hostile
requests are the tests' own (`tests/structured/`).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from graphllm.constraint import TokenConstraint, num_mask_words
from graphllm.errors import GraphLLMError
from graphllm.models.demo import demo_model_path
from graphllm.models.gguf_file import GGUFFile
from graphllm.structured.compiler import GrammarCompiler
from graphllm.structured_outputs import StructuredOutputs
from graphllm.tokenizer.tokenizer import Tokenizer
from tests.structured.hostile import hostile_requests
from tests.structured.languages import random_regex, random_schema

RESULTS = Path(__file__).parent / "results" / "structured.jsonl"
NUM_SCHEMAS = 200
NUM_REGEXES = 60
NUM_STEPS = 80


class GrownTokenizer:
    """The demo model's tokenizer with a vocabulary of any larger size."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.special_token_ids = tokenizer.special_token_ids
        self.eos_token_ids = tokenizer.eos_token_ids
        self.tokens = [tokenizer.token_bytes(i) for i in range(min(vocab_size, tokenizer.vocab_size))]
        self.vocab_size = vocab_size
        plain = [token for i, token in enumerate(self.tokens) if i not in self.special_token_ids]
        known = set(self.tokens)
        draw = random.Random(0)
        while len(self.tokens) < vocab_size:
            token = draw.choice(plain) + draw.choice(plain[:4_000])
            if len(token) < 24 and token not in known:
                known.add(token)
                self.tokens.append(token)

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens[token_id]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)


@dataclass(frozen=True, slots=True)
class Costs:
    """CPU milliseconds; `outcome` is "served", or why it was not."""

    name: str
    outcome: str
    compile_ms: float
    mask_ms: list[float]
    accept_ms: list[float]


class Measurement:
    """One vocabulary and its compiler."""

    def __init__(self, tokenizer: GrownTokenizer) -> None:
        started = time.thread_time()
        self._compiler = GrammarCompiler(tokenizer, vocab_size=tokenizer.vocab_size)
        self.build_seconds = time.thread_time() - started
        self._tokenizer = tokenizer

    def costs(self, name: str, structured: StructuredOutputs) -> Costs:
        """Compile, and walk at random three times: anyhow, along long tokens, along short ones."""
        mask_ms: list[float] = []
        accept_ms: list[float] = []
        started = time.thread_time()
        try:
            factory = self._compiler.compile(structured)
        except GraphLLMError as error:
            return Costs(name, error.message, 1e3 * (time.thread_time() - started), [], [])
        compile_ms = 1e3 * (time.thread_time() - started)
        outcome = "served"
        for seed in range(3):
            try:
                for mask, accept in self._walk(factory(), seed):
                    mask_ms.append(mask)
                    accept_ms.append(accept)
            except GraphLLMError as error:
                outcome = error.message
        return Costs(name, outcome, compile_ms, mask_ms, accept_ms)

    def _walk(self, constraint: TokenConstraint, seed: int) -> Iterator[tuple[float, float]]:
        draw = random.Random(seed)
        tokens = self._tokenizer.tokens
        for _ in range(NUM_STEPS):
            row = np.full(num_mask_words(len(tokens)), -1, np.int32)
            started = time.thread_time()
            constraint.restrict(row.data)
            mask = time.thread_time() - started
            allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
            if not len(allowed):
                return
            candidates = [int(allowed[draw.randrange(len(allowed))]) for _ in range(1 if seed == 0 else 8)]
            sign = 1 if seed == 1 else -1
            token_id = max(
                candidates, key=lambda i: (i not in self._tokenizer.eos_token_ids, sign * len(tokens[i]))
            )
            started = time.thread_time()
            constraint.accept(token_id)
            yield 1e3 * mask, 1e3 * (time.thread_time() - started)
            if constraint.is_finished:
                return


def requests() -> Mapping[str, dict[str, StructuredOutputs]]:
    """The sets that are measured, by name."""
    ordinary = {
        f"schema {seed}": StructuredOutputs(json=json.dumps(random_schema(seed)))
        for seed in range(NUM_SCHEMAS)
    }
    ordinary |= {f"regex {seed}": StructuredOutputs(regex=random_regex(seed)) for seed in range(NUM_REGEXES)}
    return {"ordinary": ordinary, "hostile": hostile_requests()}


def summary(values: Iterable[float]) -> dict[str, float]:
    """p50, p99 and max, rounded to a microsecond."""
    array = np.fromiter(values, np.float64)
    if not len(array):
        return {"p50": 0.0, "p99": 0.0, "max": 0.0}
    p50, p99 = np.percentile(array, [50, 99])
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3), "max": round(float(array.max()), 3)}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--vocab-size", type=int, default=131_072)
    parser.add_argument("--worst", type=int, default=12, help="how many of the hostile requests to list")
    parser.add_argument("--output", action="store_true", help=f"append the run to {RESULTS.name}")
    options = parser.parse_args(arguments)
    tokenizer = GrownTokenizer(Tokenizer.from_gguf(GGUFFile(demo_model_path()).fields), options.vocab_size)
    measurement = Measurement(tokenizer)
    line: dict[str, object] = {
        "benchmark": "structured",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "vocab_size": options.vocab_size,
        "build_seconds": round(measurement.build_seconds, 3),
    }
    print(f"vocabulary of {options.vocab_size:,} tokens, built in {measurement.build_seconds:.2f} s of CPU")
    print(f"{'CPU ms':24}{'requests':>9}{'served':>8}{'p50':>9}{'p99':>9}{'max':>9}")
    for name, group in requests().items():
        found = [measurement.costs(each, structured) for each, structured in group.items()]
        num_served = sum(costs.outcome == "served" for costs in found)
        figures = {
            "compile_ms": summary(costs.compile_ms for costs in found),
            "mask_ms": summary(value for costs in found for value in costs.mask_ms),
            "accept_ms": summary(value for costs in found for value in costs.accept_ms),
        }
        line[name] = {"num_requests": len(found), "num_served": num_served, **figures}
        for figure, numbers in figures.items():
            row = "".join(f"{numbers[key]:9.3f}" for key in ("p50", "p99", "max"))
            print(f"{name + ' ' + figure:24}{len(found):9}{num_served:8}{row}")
        if name == "hostile":
            print_worst(found, options.worst)
    print(json.dumps(line))
    if options.output:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return 0


def print_worst(found: list[Costs], count: int) -> None:
    def worst(costs: Costs) -> float:
        return max([costs.compile_ms, *costs.mask_ms, *costs.accept_ms])

    for costs in sorted(found, key=worst, reverse=True)[:count]:
        mask, accept = max(costs.mask_ms, default=0.0), max(costs.accept_ms, default=0.0)
        outcome = " ".join(costs.outcome.removeprefix("structured_outputs: ").split())
        times = f"compile {costs.compile_ms:7.2f}  mask {mask:7.2f}  accept {accept:7.2f}"
        print(f"  {costs.name:34} {times}  {outcome:.60}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
