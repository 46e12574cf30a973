"""Logits equal transformers', and a decoder that ignores any one switch does not pass for equal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import graphllm.layers.attention
from graphllm.attention.paged import PagedAttention
from graphllm.kernels.linear import linear_openblas, linear_ref
from graphllm.models.checkpoint import open_checkpoint
from graphllm.models.config import ModelConfig
from graphllm.models.decoder import Decoder, DecoderLayer
from graphllm.models.weights import load_model
from tests.models import equality
from tests.models.equality import (
    CPU,
    TOLERANCE,
    ConfigMutation,
    WeightMutation,
    assert_equal_in_a_mixed_batch,
    assert_equal_in_every_split,
    change,
    error,
    neutral_norm,
    norm,
    paged,
    prompt,
    rotary,
    theirs,
)
from tests.models.memory_checkpoint import as_checkpoint, tiny_llama
from tests.models.paged_model import BLOCK_SIZE, PagedModel

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "one query head a key head": {"num_key_value_heads": 4},
    "eight query heads a key head": {"num_attention_heads": 8, "num_key_value_heads": 1},
    "three query heads a key head": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "small heads": {"head_dim": 6},
    "large heads": {"head_dim": 20, "num_attention_heads": 6, "num_key_value_heads": 3},
    "attention biases": {"attention_bias": True},
    "feed-forward biases": {"mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "another norm epsilon": {"rms_norm_eps": 1e-5},
    "another base": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear rotary": {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}},
    "llama3 rotary": {"rope_parameters": LLAMA3_ROPE},
    "yarn rotary": {"rope_parameters": YARN_ROPE},
    "yarn rotary, all parameters": {
        "rope_parameters": YARN_ROPE
        | {"beta_fast": 8.0, "beta_slow": 0.5, "mscale": 1.5, "mscale_all_dim": 0.5, "truncate": False}
    },
    "gelu": {"hidden_act": "gelu"},
    "gelu by tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "all at once": {
        "head_dim": 10,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": LLAMA3_ROPE,
    },
}


# -- equality ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_chunks_and_decode_equal_transformers(variant: str) -> None:
    assert_equal_in_every_split(tiny_llama(**VARIANTS[variant]))


@pytest.mark.parametrize("product", [linear_ref, linear_openblas])
@pytest.mark.parametrize("variant", ["grouped queries", "all at once"])
def test_batch_of_mixed_lengths_equals_transformers(variant: str, product: Any) -> None:
    assert_equal_in_a_mixed_batch(tiny_llama(**VARIANTS[variant]), product=product)


def test_saved_folder_gives_the_logits_of_the_model_that_was_saved(tmp_path: Path) -> None:
    model, token_ids = tiny_llama(**VARIANTS["all at once"]), prompt(40)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    backend = PagedAttention(block_size=BLOCK_SIZE)
    checkpoint = open_checkpoint(tmp_path)
    ours = load_model(checkpoint, backend=backend, device=CPU, dtype=torch.float32, product=linear_ref)
    logits = PagedModel(ours, backend).step([(0, token_ids)])
    assert error(logits, theirs(model, token_ids)) < TOLERANCE


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_low_precision_stays_close_to_transformers_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    model, token_ids = tiny_llama(), prompt(40)
    backend = PagedAttention(block_size=BLOCK_SIZE)
    ours = load_model(as_checkpoint(model), backend=backend, device=CPU, dtype=dtype)
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    logits = PagedModel(ours, backend, dtype=dtype).step([(0, token_ids)])
    assert logits.dtype == torch.float32
    assert error(logits, theirs(model, token_ids)) < tolerance


def test_a_row_does_not_change_with_its_neighbours() -> None:
    model = tiny_llama()
    alone, crowded = paged(model), paged(model)
    token_ids = prompt(20)
    expected = alone.step([(0, token_ids)])
    logits = crowded.step([(3, prompt(7, seed=1)), (0, token_ids), (5, prompt(33, seed=2))])
    assert error(logits[7:27], expected) < 1e-5


# -- mutants: each ignores one switch, and must be found out --------------------------------------


def mutated_error(variant: str, **mutations: Any) -> float:
    return equality.mutated_error(tiny_llama(**VARIANTS[variant]), **mutations)


def scaling(**changes: Any) -> ConfigMutation:
    """Other numbers in the way the frequencies are stretched."""

    def mutate(config: ModelConfig) -> ModelConfig:
        (layer,) = set(config.layers)
        assert layer.rotary is not None and layer.rotary.scaling is not None
        return rotary(scaling=replace(layer.rotary.scaling, **changes))(config)

    return mutate


CONFIG_MUTANTS: dict[str, tuple[str, ConfigMutation]] = {
    "rotary base": ("another base", rotary(theta=10000.0)),
    "linear rotary": ("linear rotary", rotary(scaling=None)),
    "llama3 rotary": ("llama3 rotary", rotary(scaling=None)),
    "llama3 factor": ("llama3 rotary", scaling(factor=4.0)),
    "llama3 low frequency factor": ("llama3 rotary", scaling(low_freq_factor=2.0)),
    "llama3 high frequency factor": ("llama3 rotary", scaling(high_freq_factor=8.0)),
    "llama3 original context": ("llama3 rotary", scaling(original_max_position_embeddings=512)),
    "yarn rotary": ("yarn rotary", rotary(scaling=None)),
    "yarn factor": ("yarn rotary", scaling(factor=4.0)),
    "yarn attention factor": ("yarn rotary", scaling(attention_factor=1.0)),
    "yarn attention factor, given": ("yarn rotary, all parameters", scaling(attention_factor=1.208)),
    "yarn beta_fast": ("yarn rotary, all parameters", scaling(beta_fast=32.0)),
    "yarn beta_slow": ("yarn rotary, all parameters", scaling(beta_slow=1.0)),
    "yarn truncate": ("yarn rotary, all parameters", scaling(truncate=True)),
    "yarn original context": ("yarn rotary", scaling(original_max_position_embeddings=512)),
    "scale of heads that do not fill the hidden size": ("small heads", change(attention_scale=12**-0.5)),
    "norm epsilon": ("grouped queries", norm(eps=1e-6)),
    "small norm epsilon": ("another norm epsilon", norm(eps=1e-2)),
    "activation": ("grouped queries", change(activation="gelu")),
    "gelu": ("gelu", change(activation="silu")),
    "the two kinds of gelu": ("gelu by tanh", change(activation="gelu")),
    "untied head": ("grouped queries", change(tie_word_embeddings=True)),
    "tied head": ("tied", change(tie_word_embeddings=False)),
}


@pytest.mark.parametrize("switch", CONFIG_MUTANTS)
def test_a_decoder_that_ignores_a_switch_of_the_configuration_fails(switch: str) -> None:
    variant, mutation = CONFIG_MUTANTS[switch]
    assert mutated_error(variant) < TOLERANCE, "without the mutation it passes"
    assert mutated_error(variant, config=mutation) > TOLERANCE


def layers(model: Decoder) -> list[DecoderLayer]:
    return [layer for layer in model.layers if isinstance(layer, DecoderLayer)]


def swap_rows(parameter: torch.Tensor, first: slice, second: slice) -> None:
    rows = parameter[first].clone()
    parameter[first] = parameter[second]
    parameter[second] = rows


def zero_part(module: str, part: str) -> WeightMutation:
    """Zero the bias of one part of one merged layer."""

    def mutate(model: Decoder) -> None:
        for layer in layers(model):
            slot = layer.get_submodule(module).weight_slots()[f"{part}.bias" if part else "bias"]
            slot.load(torch.zeros(slot.shape))

    return mutate


def swapped_query_and_key(model: Decoder) -> None:
    for layer in layers(model):
        swap_rows(layer.attention.qkv.weight, slice(0, 48), slice(48, 96))


def swapped_key_and_value(model: Decoder) -> None:
    for layer in layers(model):
        swap_rows(layer.attention.qkv.weight, slice(48, 72), slice(72, 96))


def swapped_gate_and_up(model: Decoder) -> None:
    for layer in layers(model):
        swap_rows(layer.mlp.gate_up.weight, slice(0, 80), slice(80, 160))


def interleaved_groups(model: Decoder) -> None:
    """Query heads 0, 2 share key head 0 and heads 1, 3 share key head 1, instead of neighbours."""
    for layer in layers(model):
        queries = layer.attention.qkv.weight[:48].view(4, 12, 48)
        queries[:] = queries[[0, 2, 1, 3]].clone()
        outputs = layer.attention.output.weight.view(48, 4, 12)
        outputs[:] = outputs[:, [0, 2, 1, 3]].clone()


def interleaved_rotary(model: Decoder) -> None:
    """Neighbouring dimensions turn together, as in the original Llama code, instead of halves."""
    order = torch.arange(12).view(2, 6).t().flatten()
    for layer in layers(model):
        heads = layer.attention.qkv.weight[:72].view(6, 12, 48)
        heads[:] = heads[:, order].clone()


WEIGHT_MUTANTS: dict[str, tuple[str, WeightMutation]] = {
    "query bias": ("attention biases", zero_part("attention.qkv", "q")),
    "value bias": ("attention biases", zero_part("attention.qkv", "v")),
    "output bias": ("attention biases", zero_part("attention.output", "")),
    "gate bias": ("feed-forward biases", zero_part("mlp.gate_up", "gate")),
    "up bias": ("feed-forward biases", zero_part("mlp.gate_up", "up")),
    "down bias": ("feed-forward biases", zero_part("mlp.down", "")),
    "key bias": ("attention biases", zero_part("attention.qkv", "k")),
    "norm before attention": ("grouped queries", neutral_norm("attention_norm")),
    "norm before feed-forward": ("grouped queries", neutral_norm("mlp_norm")),
    "final norm": ("grouped queries", neutral_norm("final_norm")),
    "order of query and key": ("one query head a key head", swapped_query_and_key),
    "order of key and value": ("grouped queries", swapped_key_and_value),
    "order of gate and up": ("grouped queries", swapped_gate_and_up),
    "which query heads share a key head": ("grouped queries", interleaved_groups),
    "which dimensions turn together": ("grouped queries", interleaved_rotary),
}


@pytest.mark.parametrize("switch", WEIGHT_MUTANTS)
def test_a_decoder_that_mistakes_a_weight_fails(switch: str) -> None:
    variant, mutation = WEIGHT_MUTANTS[switch]
    assert mutated_error(variant) < TOLERANCE, "without the mutation it passes"
    assert mutated_error(variant, weights=mutation) > TOLERANCE


def test_a_decoder_without_the_causal_mask_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphllm.attention.row_groups import RowGroup

    monkeypatch.setattr(RowGroup, "is_causal", lambda *_: False)
    monkeypatch.setattr(RowGroup, "mask", lambda *_: None)
    assert mutated_error("grouped queries") > TOLERANCE


def test_a_decoder_without_rotary_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = graphllm.layers.attention
    write = attention.rotary_cache_write
    monkeypatch.setattr(attention, "rotary_cache_write", lambda qkv, _, **rest: write(qkv, None, **rest))
    assert mutated_error("grouped queries") > TOLERANCE


def test_a_decoder_that_counts_positions_anew_in_each_chunk_fails() -> None:
    model, token_ids = tiny_llama(), prompt(30)
    ours = paged(model)
    ours.step([(0, token_ids[:15])])
    forward = ours.model.forward
    ours.model.forward = lambda ids, positions, **rest: forward(ids, positions - 15, **rest)  # type: ignore[method-assign]
    assert error(ours.step([(0, token_ids[15:])]), theirs(model, token_ids)[15:]) > TOLERANCE
