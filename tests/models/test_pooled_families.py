"""Families without a head give transformers' hidden states, and with one thing wrong they do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from graphllm.attention.paged import PagedAttention
from graphllm.kernels.linear import linear_ref
from graphllm.models.config import ModelConfig
from graphllm.models.decoder import Decoder
from graphllm.models.registry import find_family, read_model_config
from graphllm.models.weights import load_weights
from graphllm.quant.unquantized import Unquantized
from tests.models.equality import CPU, TOLERANCE, ConfigMutation, change, error, layers, norm, paged, prompt
from tests.models.memory_checkpoint import TINY_SHAPE, as_checkpoint, redraw
from tests.models.paged_model import BLOCK_SIZE, PagedModel

ENCODER_SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
    "layer_norm_eps": 1e-2,
    "attn_implementation": "eager",
}
HEAD_DIM = {"head_dim": 12}
BIDIRECTIONAL = {"use_bidirectional_attention": True}
LENGTHS = (90, 1, 2, 17)


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledCase:
    """A tiny model of transformers' class, and mutants that must be found out."""

    architecture: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    shape: Mapping[str, Any] = field(default_factory=lambda: TINY_SHAPE)
    mutants: Mapping[str, ConfigMutation] = field(default_factory=dict)

    def tiny(self) -> PreTrainedModel:
        model_class = getattr(transformers, self.architecture)
        config = model_class.config_class(**(self.shape | self.keys))
        model = model_class(config).eval()
        assert isinstance(model, PreTrainedModel)
        redraw(model, seed=0)
        return model


def causal_mask(config: ModelConfig) -> ModelConfig:
    return replace(config, is_causal=True)


def no_offset(config: ModelConfig) -> ModelConfig:
    return replace(config, learned_position_offset=0)


CASES = {
    "BERT": PooledCase(
        architecture="BertModel",
        shape=ENCODER_SHAPE,
        mutants={
            "a causal mask": causal_mask,
            "another epsilon": norm(eps=1e-12),
            "tanh's gelu": change(activation="gelu_tanh"),
        },
    ),
    "XLM-RoBERTa": PooledCase(
        architecture="XLMRobertaModel",
        shape=ENCODER_SHAPE | {"type_vocab_size": 1},
        mutants={"a causal mask": causal_mask, "positions from the first row": no_offset},
    ),
    "RoBERTa": PooledCase(architecture="RobertaModel", shape=ENCODER_SHAPE),
    "EmbeddingGemma": PooledCase(
        architecture="Gemma3TextModel",
        keys=HEAD_DIM | BIDIRECTIONAL | {"sliding_window": 20, "query_pre_attn_scalar": 16},
        mutants={
            "a causal mask": causal_mask,
            "no window": layers(sliding_window=None),
            "the window to either side": layers(sliding_window=20),
        },
    ),
    "Gemma 3": PooledCase(
        architecture="Gemma3TextModel",
        keys=HEAD_DIM | {"sliding_window": 20, "query_pre_attn_scalar": 16},
        mutants={"sees all": lambda config: replace(layers(sliding_window=None)(config), is_causal=False)},
    ),
    "Qwen3": PooledCase(architecture="Qwen3Model", keys=HEAD_DIM | {"tie_word_embeddings": True}),
    "Qwen2": PooledCase(architecture="Qwen2Model", mutants={"no biases": change(attention_bias=False)}),
    "Mistral": PooledCase(architecture="MistralModel", keys=HEAD_DIM | {"sliding_window": 13}),
    "Llama": PooledCase(architecture="LlamaModel"),
    "Gemma 2": PooledCase(architecture="Gemma2Model", keys=HEAD_DIM | {"sliding_window": 13}),
}
MUTANTS = [
    pytest.param(case, mutation, id=f"{name}: {mutant}")
    for name, case in CASES.items()
    for mutant, mutation in case.mutants.items()
]


def theirs(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        hidden: torch.Tensor = model(torch.tensor([token_ids])).last_hidden_state[0]
    return hidden


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_hidden_states_equal_transformers(case: PooledCase) -> None:
    """Of prompts of several lengths in one step, where each row must see itself and nothing else."""
    model = case.tiny()
    ours = paged(model)
    # transformers would take RoBERTa's padding token, 1, for none.
    prompts = [[2 + token_id % 95 for token_id in prompt(length, seed=length)] for length in LENGTHS]
    # Rows of one token go first, as the scheduler has them.
    rows = sorted(enumerate(prompts), key=lambda row: len(row[1]) > 1)
    ours.step(rows, num_decode_rows=1)
    hidden = ours.hidden(sum(LENGTHS)).split([len(token_ids) for _, token_ids in rows])
    for found, (_, token_ids) in zip(hidden, rows, strict=True):
        assert error(found, theirs(model, token_ids)) < TOLERANCE / 10, f"{len(token_ids)} tokens"


@pytest.mark.parametrize(("case", "mutation"), MUTANTS)
def test_a_model_with_one_thing_wrong_is_found_out(case: PooledCase, mutation: ConfigMutation) -> None:
    model = case.tiny()
    checkpoint = as_checkpoint(model)
    family = find_family(checkpoint)
    mutant = Decoder(
        mutation(read_model_config(checkpoint, family)),
        backend=PagedAttention(block_size=BLOCK_SIZE),
        scheme=Unquantized(linear_ref),
        device=CPU,
        dtype=torch.float32,
    )
    checkpoint.tensors = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if not (name.endswith("_proj.bias") and not mutant.config.attention_bias)
    }
    load_weights(mutant, checkpoint, family=family)
    ours, token_ids = PagedModel(mutant, mutant.backend), [2 + each % 95 for each in prompt(90)]
    ours.step([(0, token_ids)])
    assert error(ours.hidden(90), theirs(model, token_ids)) > TOLERANCE
