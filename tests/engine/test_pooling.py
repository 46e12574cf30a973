"""Pooling: the hidden state of a prompt's last token, as transformers has it behind the final norm."""

from __future__ import annotations

import asyncio
import math
import random
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from graphllm.engine.engine import Engine
from graphllm.errors import InvalidRequestError
from graphllm.outputs import FinishReason, SequenceDelta, l2_normalized
from graphllm.runner.device import CpuDevice, Device, InlineDevice
from graphllm.sampling_params import SamplingParams
from tests.engine.harness import Collector, add, assert_nothing_held, ended, running_engine, settle
from tests.engine.test_memory_tiers import BLOCK_SIZE, block_bytes, gib

TOLERANCE = 1e-4
CONTEXT = 256
POOLING = SamplingParams(max_tokens=0)
LONG = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
DEVICES = pytest.mark.parametrize("open_device", [InlineDevice, lambda: CpuDevice(1)], ids=["inline", "cpu"])


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return model


def prompt(length: int, *, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


class Pooled(Collector):
    """A pooling request's sink."""

    def __init__(self, engine: Engine, name: str, token_ids: list[int], *, lora: str | None = None) -> None:
        super().__init__()
        self.deltas: list[SequenceDelta] = []
        self.on_write = self.deltas.append
        engine.add(name, token_ids, params=POOLING, sink=self, pooling=True, lora=lora)

    @property
    def embedding(self) -> array[float]:
        """Raises unless the request had one answer and nothing else."""
        (delta,) = self.deltas
        assert (delta.text, delta.token_ids, delta.logprobs) == ("", (), None)
        assert delta.finish_reason is FinishReason.STOP and delta.stop_reason is None
        assert delta.pooled is not None and delta.pooled.typecode == "f"
        return delta.pooled


def assert_equal_to(reference: PreTrainedModel, found: array[float], token_ids: list[int]) -> None:
    with torch.inference_mode():
        # Behind the final norm, by transformers' convention for the last of the hidden states.
        hidden = reference(torch.tensor([token_ids]), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(torch.tensor(found), hidden[0, -1], rtol=0.0, atol=TOLERANCE)


@pytest.mark.parametrize("chunk", [256, 23])
@DEVICES
def test_prompts_of_mixed_lengths_beside_generation(
    tiny_model: Path, reference: PreTrainedModel, chunk: int, open_device: Callable[[], Device]
) -> None:
    async def run() -> None:
        flags = {"max_num_batched_tokens": chunk, "max_num_seqs": 8, "debug_kv": True}
        async with running_engine(tiny_model, device=open_device(), **flags) as engine:
            alone = add(engine, "alone", prompt(9), LONG)
            await ended(alone)
            beside = add(engine, "beside", prompt(9), LONG)
            prompts = [prompt(length, seed=length) for length in (1, 3, 16, 40, 90, 17, 130, 2, CONTEXT)]
            sinks = [Pooled(engine, f"r{index}", each) for index, each in enumerate(prompts)]
            await ended(beside, *sinks)
            for sink, token_ids in zip(sinks, prompts, strict=True):
                assert_equal_to(reference, sink.embedding, token_ids)
            assert beside.token_ids == alone.token_ids
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(run())


def test_a_cached_prompt_gives_the_same_answer(tiny_model: Path, reference: PreTrainedModel) -> None:
    async def run() -> None:
        flags = {"max_num_seqs": 4, "enable_prefix_caching": True, "debug_kv": True}
        async with running_engine(tiny_model, **flags) as engine:
            token_ids = prompt(96)  # six whole blocks
            for num_cached_tokens in (0, 80, 80):
                sink = Pooled(engine, f"r{num_cached_tokens}-{len(token_ids)}", token_ids)
                await ended(sink)
                assert sink.num_cached_tokens == num_cached_tokens, "the last block is computed again"
                assert_equal_to(reference, sink.embedding, token_ids)
            longer = [*token_ids, 1, 2, 3]
            sink = Pooled(engine, "longer", longer)
            await ended(sink)
            assert sink.num_cached_tokens == 96
            assert_equal_to(reference, sink.embedding, longer)

    asyncio.run(run())


@pytest.mark.parametrize("num_swap_blocks", [0, 200], ids=["recomputed", "swapped"])
def test_a_prompt_that_gives_way_in_the_middle(
    tiny_model: Path, reference: PreTrainedModel, num_swap_blocks: int
) -> None:
    flags: dict[str, Any] = {
        "block_size": BLOCK_SIZE,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 17,
        "max_model_len": 128,
        "kv_cache_memory_bytes": 90 * block_bytes(),
        "swap_space": gib(num_swap_blocks),
        "debug_kv": True,
    }
    growing = SamplingParams(temperature=0.0, max_tokens=80, ignore_eos=True)

    async def run() -> None:
        async with running_engine(tiny_model, device=CpuDevice(1), **flags) as engine:
            others = [add(engine, f"r{i}", prompt(10, seed=i), growing) for i in range(12)]
            prompts = [prompt(100, seed=50 + i) for i in range(3)]
            sinks = [Pooled(engine, f"pooled-{i}", each) for i, each in enumerate(prompts)]
            leaders = [engine._loaded._requests[f"pooled-{i}"].group.sequences[0] for i in range(3)]
            await ended(*others, *sinks)
            assert sum(leader.num_preemptions for leader in leaders) > 0
            assert any(leader.num_swaps for leader in leaders) == bool(num_swap_blocks)
            for sink, token_ids in zip(sinks, prompts, strict=True):
                assert_equal_to(reference, sink.embedding, token_ids)
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(run())


@pytest.mark.parametrize("params", [SamplingParams(max_tokens=1), SamplingParams(max_tokens=0, n=2)])
def test_pooling_refuses_parameters_of_generation(tiny_model: Path, params: SamplingParams) -> None:
    async def run() -> None:
        async with running_engine(tiny_model, max_num_seqs=2) as engine:
            with pytest.raises(InvalidRequestError, match="max_tokens must be 0, and n 1"):
                engine.add("r", prompt(3), params=params, sink=Collector(), pooling=True)
            assert engine.num_unfinished_requests == 0

    asyncio.run(run())


def test_a_normalized_embedding_has_length_1_and_the_same_direction() -> None:
    found = l2_normalized(array("f", [3.0, -4.0, 12.0]))
    assert found.tolist() == pytest.approx([3 / 13, -4 / 13, 12 / 13], rel=1e-6)
    assert math.hypot(*l2_normalized(array("f", [1e-30, 1e-30]))) == pytest.approx(1.0, rel=1e-6)
    assert l2_normalized(array("f", [0.0, 0.0])).tolist() == [0.0, 0.0]
