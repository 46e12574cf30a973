"""The demo model at temperature 1 under 200 schemas and patterns: finished is valid, cut is a beginning."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import pytest

from graphllm import LLM, SamplingParams
from graphllm.outputs import CompletionOutput, FinishReason
from graphllm.structured.compiler import GrammarCompiler
from graphllm.structured_outputs import StructuredOutputs
from tests.structured.languages import random_regex, random_schema
from tests.structured.test_random_walks import check_json
from tests.structured.walks import Walk

NUM_SCHEMAS, NUM_REGEXES = 160, 40
MAX_TOKENS = 72


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(
        "demo", dtype="float32", cpu_threads=1, max_model_len=1024, kv_cache_memory_bytes=400 * 2**20
    ) as llm:
        yield llm


def check(output: CompletionOutput, wanted: StructuredOutputs, seed: int, *, text: bytes) -> None:
    """`text` is the output, or what became of it when it was finished otherwise."""
    if wanted.json is not None:
        check_json(text, random_schema(seed))
    else:
        assert re.fullmatch(random_regex(seed), text.decode()), output.text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_finished_outputs_are_valid_and_cut_ones_can_be_finished(llm: LLM) -> None:
    wanted = [(seed, StructuredOutputs(json=random_schema(seed))) for seed in range(NUM_SCHEMAS)]
    wanted += [(seed, StructuredOutputs(regex=random_regex(seed))) for seed in range(NUM_REGEXES)]
    params = [
        SamplingParams(temperature=1.0, seed=seed, max_tokens=MAX_TOKENS, structured_outputs=structured)
        for seed, structured in wanted
    ]
    results = llm.generate(["An example:\n"] * len(wanted), params, use_tqdm=False)
    tokenizer = llm.engine.tokenizer
    end_token_ids = tokenizer.eos_token_ids
    compiler = GrammarCompiler(
        tokenizer, vocab_size=tokenizer.vocab_size, eos_token_ids=sorted(end_token_ids)
    )
    num_finished = 0
    for (seed, structured), result in zip(wanted, results, strict=True):
        (output,) = result.outputs
        if output.finish_reason is FinishReason.STOP:
            num_finished += 1
            check(output, structured, seed, text=output.text.encode())
            continue
        assert output.finish_reason is FinishReason.LENGTH
        walk = Walk(
            compiler.compile(structured)(),
            tokenizer,
            tokenizer.vocab_size,
            frozenset(end_token_ids),
            random.Random(seed),
        )
        for token_id in output.token_ids:
            walk.take(token_id)
        walk.complete()
        assert walk.output.startswith(b"".join(map(tokenizer.token_bytes, output.token_ids)))
        check(output, structured, seed, text=walk.output)
    # Otherwise this would have shown only half of its claim.
    assert 0.4 * len(wanted) < num_finished < len(wanted)
