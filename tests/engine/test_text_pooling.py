"""Pooling of every kind equals transformers' hidden states pooled by hand, in chunks and beside others."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from graphllm.config import EngineConfig, PlanConfig
from graphllm.engine.engine import Engine
from graphllm.engine.planning import as_text, plan_capacity
from graphllm.errors import ConfigError, InvalidRequestError
from graphllm.models.pooling import PoolingConfig, read_pooling
from graphllm.runner.device import CpuDevice, Device, InlineDevice
from graphllm.sampling_params import SamplingParams
from tests.engine.harness import Collector, add, assert_nothing_held, ended, running_engine, settle
from tests.engine.test_memory_tiers import BLOCK_SIZE, block_bytes, gib
from tests.engine.test_pooling import Pooled
from tests.pooled_models import hidden_states, write_model, write_sentence_transformer

TOLERANCE = 1e-4
WAYS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "cls": ("pooling_mode_cls_token", lambda hidden: hidden[0]),
    "last": ("pooling_mode_lasttoken", lambda hidden: hidden[-1]),
    "mean": ("pooling_mode_mean_tokens", lambda hidden: hidden.mean(0)),
    "mean_sqrt": (
        "pooling_mode_mean_sqrt_len_tokens",
        lambda hidden: hidden.sum(0) / math.sqrt(len(hidden)),
    ),
    "max": ("pooling_mode_max_tokens", lambda hidden: hidden.amax(0)),
}
LENGTHS = (1, 3, 16, 40, 90, 17, 130, 2, 256)


def prompt(length: int, *, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(2, 256) for _ in range(length)]


def pooled_model(folder: Path, architecture: str, way: str, **keys: Any) -> Any:
    model = write_model(folder, architecture, **keys)
    write_sentence_transformer(folder, pooling={WAYS[way][0]: True})
    return model


async def check_all(engine: Engine, model: Any, way: str, prompts: list[list[int]]) -> None:
    sinks = [Pooled(engine, f"r{index}", each) for index, each in enumerate(prompts)]
    await ended(*sinks)
    for sink, token_ids in zip(sinks, prompts, strict=True):
        expected = WAYS[way][1](hidden_states(model, token_ids))
        torch.testing.assert_close(torch.tensor(sink.embedding), expected, rtol=0.0, atol=TOLERANCE)
    await settle(engine)
    assert_nothing_held(engine)


@pytest.mark.parametrize("way", WAYS)
def test_a_causal_model_pools_over_chunks(tmp_path: Path, way: str) -> None:
    model = pooled_model(tmp_path, "Qwen3Model", way)

    async def run() -> None:
        flags = {"max_num_batched_tokens": 23, "max_num_seqs": 4, "debug_kv": True}
        async with running_engine(tmp_path, device=CpuDevice(1), **flags) as engine:
            await check_all(engine, model, way, [prompt(length, seed=length) for length in LENGTHS])

    asyncio.run(run())


@pytest.mark.parametrize("way", ["cls", "mean"])
@pytest.mark.parametrize("open_device", [InlineDevice, lambda: CpuDevice(1)], ids=["inline", "cpu"])
def test_an_encoder_computes_every_text_whole(
    tmp_path: Path, way: str, open_device: Callable[[], Device]
) -> None:
    model = pooled_model(tmp_path, "BertModel", way)

    async def run() -> None:
        flags = {"max_num_batched_tokens": 300, "max_num_seqs": 16, "debug_kv": True}
        async with running_engine(tmp_path, device=open_device(), **flags) as engine:
            await check_all(engine, model, way, [prompt(length, seed=length) for length in LENGTHS])

    asyncio.run(run())


def test_a_repeated_text_is_pooled_whole(tmp_path: Path) -> None:
    """Cached blocks have no hidden states: a mean must not begin behind them."""
    model = pooled_model(tmp_path, "Qwen3Model", "mean")

    async def run() -> None:
        async with running_engine(tmp_path, max_num_seqs=4) as engine:
            for _ in range(2):
                await check_all(engine, model, "mean", [prompt(96)])

    asyncio.run(run())


@pytest.mark.parametrize("num_swap_blocks", [0, 200], ids=["without swap space", "with swap space"])
def test_a_text_that_gives_way_is_pooled_anew(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, num_swap_blocks: int
) -> None:
    """Its sum has stayed behind in the slot that it lost. (Only a model that generates is so crowded.)"""

    def read_mean_pooling(*arguments: Any) -> PoolingConfig:
        return replace(read_pooling(*arguments), method="mean")

    monkeypatch.setattr("graphllm.engine.loading.read_pooling", read_mean_pooling)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
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
            if num_swap_blocks:  # others are swapped in their stead
                assert engine._loaded.model.scheduler.counters.num_swapped_out_blocks > 0
                assert not any(leader.num_swaps for leader in leaders)
            else:
                assert sum(leader.num_preemptions for leader in leaders) > 0
            for sink, token_ids in zip(sinks, prompts, strict=True):
                expected = hidden_states(reference.model, token_ids).mean(0)
                torch.testing.assert_close(torch.tensor(sink.embedding), expected, rtol=0.0, atol=TOLERANCE)
            await settle(engine)
            assert_nothing_held(engine)

    asyncio.run(run())


def test_layers_behind_pooling_are_applied(tmp_path: Path) -> None:
    """EmbeddingGemma's form: windows to both sides, the mean, and two layers behind it."""
    model = write_model(
        tmp_path,
        "Gemma3TextModel",
        use_bidirectional_attention=True,
        sliding_window=24,
        query_pre_attn_scalar=16,
    )
    layers = [(32, 48, "linear.Identity"), (48, 20, "activation.Tanh")]
    write_sentence_transformer(tmp_path, pooling={"pooling_mode_mean_tokens": True}, dense=layers)

    async def run() -> None:
        async with running_engine(tmp_path, max_num_seqs=4) as engine:
            token_ids = prompt(90)
            sink = Pooled(engine, "r", token_ids)
            await ended(sink)
            expected = hidden_states(model, token_ids).mean(0)
            for index in (2, 3):
                tensors = load_file(tmp_path / f"{index}_Dense/model.safetensors")
                expected = tensors["linear.weight"] @ expected + tensors["linear.bias"]
            torch.testing.assert_close(
                torch.tensor(sink.embedding), expected.tanh(), rtol=0.0, atol=TOLERANCE
            )

    asyncio.run(run())


@pytest.mark.parametrize(
    ("flags", "context"),
    [
        ({}, 300),
        ({"max_num_batched_tokens": 64}, 64),
        ({"max_model_len": 40, "max_num_batched_tokens": 64}, 40),
        ({"max_model_len": 270}, 270),
    ],
)
def test_an_encoder_has_no_longer_texts_than_a_step_holds(
    tmp_path: Path, flags: dict[str, int], context: int
) -> None:
    write_model(tmp_path, "BertModel")

    async def run() -> None:
        async with running_engine(tmp_path, max_num_seqs=4, **flags) as engine:
            assert engine.max_model_len == context
            sink = Pooled(engine, "r", prompt(context))
            await ended(sink)
            with pytest.raises(InvalidRequestError, match=f"context of {context} tokens"):
                Pooled(engine, "longer", prompt(context + 1))

    asyncio.run(run())


def test_an_encoder_refuses_flags_that_would_split_texts(tmp_path: Path) -> None:
    write_model(tmp_path, "BertModel")
    for flags, message in (
        ({"max_model_len": 100, "max_num_batched_tokens": 64}, "--max-model-len 100 is above"),
        ({"pin_prefix": ("a.txt",)}, "--pin-prefix keeps prefixes"),
        ({"kv_offloading_size": 0.1}, "--kv-offloading-size keeps prefixes"),
    ):
        with pytest.raises(ConfigError, match=message):
            asyncio.run(_start(tmp_path, **flags))


def test_sizes_are_declared_by_a_flag(tmp_path: Path) -> None:
    write_model(tmp_path, "BertModel")

    async def run() -> None:
        async with running_engine(tmp_path, max_num_seqs=4, matryoshka_dimensions=(8, 16)) as engine:
            assert (engine.pooling.can_be_cut, engine.pooling.sizes) == (True, (8, 16))

    asyncio.run(run())
    with pytest.raises(ConfigError, match="must lie between 1 and 32, not 33"):
        asyncio.run(_start(tmp_path, matryoshka_dimensions=(8, 33)))


def test_sizes_are_for_models_of_vectors(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="is for models that were published for embeddings"):
        asyncio.run(_start(tiny_model, matryoshka_dimensions=(8,)))


def test_the_published_length_bounds_texts(tmp_path: Path) -> None:
    write_model(tmp_path, "BertModel")
    write_sentence_transformer(tmp_path, pooling={"pooling_mode_cls_token": True}, max_seq_length=33)

    async def run() -> None:
        async with running_engine(tmp_path, max_num_seqs=4) as engine:
            assert engine.max_model_len == 33

    asyncio.run(run())


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [("BertModel", {}), ("Gemma3TextModel", {"head_dim": 32, "use_bidirectional_attention": True})],
)
def test_weights_made_smaller_give_vectors_nearby(
    tmp_path: Path, architecture: str, keys: dict[str, Any]
) -> None:
    model = write_model(tmp_path, architecture, hidden_size=64, intermediate_size=128, **keys)
    write_sentence_transformer(
        tmp_path, pooling={"pooling_mode_mean_tokens": True, "word_embedding_dimension": 64}
    )
    expected = hidden_states(model, prompt(40)).mean(0)

    async def distance(quantization: str) -> float:
        async with running_engine(tmp_path, max_num_seqs=2, quantization=quantization) as engine:
            sink = Pooled(engine, "r", prompt(40))
            await ended(sink)
        return 1.0 - float(torch.cosine_similarity(torch.tensor(sink.embedding), expected, dim=0))

    int8, int4 = (asyncio.run(distance(quantization)) for quantization in ("int8", "int4"))
    assert 1e-6 < int8 < 2e-3
    assert int8 < int4 < 0.1


def test_a_plan_knows_what_an_encoder_has_not(tmp_path: Path) -> None:
    write_model(tmp_path, "BertModel", max_position_embeddings=4096)
    plan = plan_capacity(EngineConfig(model=str(tmp_path)), PlanConfig(gpu="h100"))
    assert "none; the model gives no tokens" in as_text(plan)
    assert plan.limits.max_model_len == plan.limits.max_num_batched_tokens == 4096


@pytest.mark.parametrize("params", [SamplingParams(max_tokens=3), SamplingParams(max_tokens=0)])
def test_a_model_for_vectors_generates_nothing(tmp_path: Path, params: SamplingParams) -> None:
    write_model(tmp_path, "Qwen3Model")

    async def run() -> None:
        async with running_engine(tmp_path, max_num_seqs=2) as engine:
            with pytest.raises(InvalidRequestError, match="is for embeddings and generates no text"):
                engine.add("r", prompt(3), params=params, sink=Collector())
            assert engine.num_unfinished_requests == 0

    asyncio.run(run())


async def _start(folder: Path, **flags: Any) -> None:
    async with running_engine(folder, max_num_seqs=4, **flags):
        raise AssertionError(f"started with {flags}")
