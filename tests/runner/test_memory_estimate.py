"""What is estimated before anything is loaded is what the decoder then has."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graphllm.attention.paged import PagedAttention
from graphllm.kernels.linear import linear_ref
from graphllm.models.config import ModelConfig
from graphllm.models.decoder import Decoder
from graphllm.models.dummy import DummyCheckpoint
from graphllm.models.registry import find_family, read_model_config
from graphllm.quant.scheme_source import one_scheme
from graphllm.quant.unquantized import Unquantized
from graphllm.runner.memory_estimate import estimate_arena_bytes, estimate_table_bytes, weight_bytes
from graphllm.runner.memory_plan import StepLimits
from graphllm.runner.step_buffers import StepBuffers
from tests.models.equality import paged, prompt
from tests.models.memory_checkpoint import tiny_qwen3
from tests.models.moe_families import DEEPSEEK_V2, DEEPSEEK_V3, MIXTRAL, QWEN2_MOE
from tests.runner.test_memory_plan import limits_of

SHAPES = Path(__file__).parents[2] / "benchmarks" / "shapes"


def model_config(name: str) -> ModelConfig:
    checkpoint = DummyCheckpoint(SHAPES / f"{name}.json")
    return read_model_config(checkpoint, find_family(checkpoint))


LLAMA, QWEN = model_config("llama-3.2-1b"), model_config("qwen3-0.6b")
BF16 = torch.bfloat16
VARIANTS = {
    "llama": LLAMA,
    "qwen": QWEN,
    "untied": replace(LLAMA, tie_word_embeddings=False),
    "biases": replace(QWEN, attention_bias=True, attention_output_bias=True, mlp_bias=True),
    "heads that do not fill the hidden size": replace(LLAMA, head_dim=80, num_kv_heads=4),
    "experts": model_config("qwen3-30b-a3b"),
    "experts with biases, sinks": model_config("gpt-oss-20b"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_counted_by_part_as_the_decoder_has_them(variant: str, dtype: torch.dtype) -> None:
    config = VARIANTS[variant]
    decoder = Decoder(
        config,
        backend=PagedAttention(block_size=16),
        schemes=one_scheme(Unquantized(linear_ref)),
        device=torch.device("meta"),
        dtype=dtype,
    )
    found: Counter[str] = Counter()
    for name, parameter in decoder.named_parameters():
        part = name.split(".")[2] if name.startswith("layers.") else name.split(".")[0]
        found["norms" if "norm" in name else part] += parameter.nbytes
    counted = weight_bytes(config, dtype)
    assert counted.embedding == found["embedding"]
    assert counted.attention == found["attention"]
    assert counted.feed_forward == found["mlp"] + found["moe"]
    assert counted.norms == found["norms"]
    assert counted.head == found["head"]
    assert counted.total == found.total()


def test_intermediates_grow_with_the_step_the_sequences_and_the_format() -> None:
    small = limits_of(model_context=4096, max_num_batched_tokens=1024)
    large = replace(small, max_num_batched_tokens=2048)

    def estimate(limits: StepLimits, dtype: torch.dtype = torch.bfloat16, max_num_seqs: int = 8) -> int:
        return estimate_arena_bytes(LLAMA, dtype, limits=limits, max_num_seqs=max_num_seqs)

    # 3 x 2048 hidden, 2 x 8192 into and 8192 out of the feed-forward layer, 2 x 64 rotary.
    assert estimate(large) - estimate(small) == 1024 * 2 * (3 * 2048 + 3 * 8192 + 128)
    assert estimate(small, torch.float32) - estimate(small) == estimate(large) - estimate(small)
    assert estimate(small, max_num_seqs=9) - estimate(small) == 4 * 128256


# With one expert a token, so that nothing is as large as the experts' results, which a CPU adds up at once.
INTERMEDIATES = {
    "dense": lambda: tiny_qwen3(),
    "large heads": lambda: tiny_qwen3(head_dim=40),
    "a small feed-forward layer": lambda: tiny_qwen3(intermediate_size=40),
    "experts": lambda: MIXTRAL.tiny("windows, wide heads, one expert a token"),
    "large experts": lambda: MIXTRAL.tiny("windows, wide heads, one expert a token", intermediate_size=200),
    "a gated shared expert": lambda: QWEN2_MOE.tiny("a gated shared expert", num_experts_per_tok=1),
    "latents": lambda: DEEPSEEK_V2.tiny("queries from a latent", num_experts_per_tok=1),
    "latents of keys alone": lambda: DEEPSEEK_V3.tiny(
        "queries from the hidden state, halves turn, not normalized", num_experts_per_tok=1
    ),
}


@pytest.mark.parametrize("name", INTERMEDIATES)
def test_intermediates_are_those_that_the_decoder_takes(name: str) -> None:
    model = paged(INTERMEDIATES[name]())
    model.step([(0, prompt(100))])
    estimated, without_a_step = (
        estimate_arena_bytes(
            model.model.config,
            torch.float32,
            limits=replace(limits_of(), max_num_batched_tokens=num_tokens),
            max_num_seqs=1,
        )
        for num_tokens in (100, 0)
    )
    assert model._arena.num_bytes == estimated - without_a_step


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "mixtral-8x7b"])
def test_experts_take_a_row_for_each_of_a_token_s_experts(name: str) -> None:
    config = model_config(name)
    moe = config.layers[0].moe
    assert moe is not None
    small = limits_of(model_context=4096, max_num_batched_tokens=1024)
    large = replace(small, max_num_batched_tokens=2048)
    dense = replace(
        config, intermediate_size=1, layers=tuple(replace(layer, moe=None) for layer in config.layers)
    )

    def grown(config: ModelConfig) -> int:
        return estimate_arena_bytes(config, BF16, limits=large, max_num_seqs=1) - estimate_arena_bytes(
            config, BF16, limits=small, max_num_seqs=1
        )

    query_size = config.num_heads * config.head_dim
    qkv_size = query_size + 2 * config.num_kv_heads * config.head_dim
    rows = moe.routing.top_k
    wide = max(rows * config.hidden_size, qkv_size) - qkv_size
    inner = max(rows * moe.expert_intermediate_size, query_size) - query_size
    routing = moe.routing.num_experts + 2 * rows  # four bytes each
    assert grown(config) - grown(dense) == 1024 * (2 * (wide + inner) + 4 * routing)
    assert wide > 0


@pytest.mark.parametrize(
    ("vocab_size", "flags"),
    [
        (64000, {"max_num_seqs": 16, "max_model_len": 1024}),
        (512, {"max_num_seqs": 16, "max_model_len": 65536}),
        (512, {"max_num_seqs": 256, "max_model_len": 64}),
        (512, {"max_num_seqs": 1, "max_model_len": 64, "max_num_batched_tokens": 65536}),
    ],
    ids=["vocabulary", "context", "sequences", "tokens"],
)
def test_step_tables_are_estimated_to_within_a_tenth(vocab_size: int, flags: dict[str, int]) -> None:
    limits, max_num_seqs = limits_of(**flags), flags["max_num_seqs"]
    buffers = StepBuffers(
        limits, max_num_seqs=max_num_seqs, vocab_size=vocab_size, device=torch.device("cpu")
    )
    config = replace(LLAMA, vocab_size=vocab_size)
    estimated = estimate_table_bytes(config, limits, max_num_seqs=max_num_seqs)
    assert estimated == pytest.approx(tensor_bytes(buffers), rel=0.1)


def tensor_bytes(value: object) -> int:
    """The tensors that an object holds, directly or through its own objects."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    names = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return sum(tensor_bytes(getattr(value, name)) for name in {*names, *getattr(value, "__dict__", ())})
