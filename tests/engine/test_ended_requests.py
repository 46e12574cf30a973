"""What is large about a request is gone with its end: nothing waits for the garbage collector."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path

import pytest

from graphllm.errors import EngineUnavailableError
from graphllm.runner.device import CpuDevice
from graphllm.sampling_params import SamplingParams
from tests.engine.harness import Collector, add, ended, running_engine, settle
from tests.engine.languages import LanguageCompiler, words


class Prompt(list[int]):
    """A list that can be asked whether anybody still has it."""


COMPLETE = words("ab", "cd", n=2)
CUT = SamplingParams(max_tokens=6, ignore_eos=True, stop=("\x00nothing",))
SCORED = SamplingParams(max_tokens=0, prompt_logprobs=3)


@pytest.mark.parametrize("params", [COMPLETE, CUT, SCORED], ids=["constrained", "free", "scored"])
@pytest.mark.parametrize("ending", ["its own", "abort", "failure"])
def test_nothing_large_of_an_ended_request_waits_for_the_collector(
    tiny_model: Path, params: SamplingParams, ending: str
) -> None:
    async def scenario() -> None:
        async with running_engine(tiny_model, device=CpuDevice(1), max_num_seqs=8) as engine:
            compiler = LanguageCompiler().install(engine)
            kept = add(engine, "neighbour", [9, 8], SamplingParams(max_tokens=60, ignore_eos=True))
            prompt = Prompt(range(1, 80))
            wanted: list[weakref.ref[object]] = [weakref.ref(prompt)]
            collector = Collector(params.n)
            engine.add("r", prompt, params=params, sink=collector)
            del prompt
            (sequence, *_) = engine._loaded._requests["r"].group.sequences
            if ending != "its own":
                if params.max_tokens != 0:
                    while not any(collector.token_ids):
                        await asyncio.sleep(0)
                if ending == "abort":
                    engine.abort("r")
                else:
                    engine._loaded._fail("r", EngineUnavailableError("for a test"))
            else:
                await ended(collector)
            wanted += [weakref.ref(constraint) for constraint in compiler.made]
            compiler.made.clear()
            await ended(kept)
            await settle(engine)
            assert [reference() for reference in wanted] == [None] * len(wanted)
            assert sequence.is_finished and not sequence.token_ids and not sequence.block_hashes

    gc.disable()
    try:
        asyncio.run(scenario())
    finally:
        gc.enable()
