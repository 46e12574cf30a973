"""Families without a head give transformers' hidden states, and with one thing wrong they do not."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from graphllm.attention.paged import PagedAttention
from graphllm.errors import CheckpointError
from graphllm.kernels.linear import linear_ref
from graphllm.models.decoder import Decoder
from graphllm.models.quantization import read_quantization
from graphllm.models.registry import find_family, read_model_config
from graphllm.models.weights import load_model, load_weights
from graphllm.quant.scheme_source import one_scheme
from graphllm.quant.unquantized import Unquantized
from tests.models.equality import CPU, TOLERANCE, ConfigMutation, error, paged, prompt
from tests.models.memory_checkpoint import as_checkpoint
from tests.models.paged_model import BLOCK_SIZE, PagedModel
from tests.models.pooled_families import CASES, PooledCase

LENGTHS = (90, 1, 2, 17)
MUTANTS = [
    pytest.param(case, mutation, id=f"{name}: {mutant}")
    for name, case in CASES.items()
    for mutant, mutation in case.mutants.items()
]


def theirs(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        hidden: torch.Tensor = model.base_model(torch.tensor([token_ids])).last_hidden_state[0]
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
        schemes=one_scheme(Unquantized(linear_ref)),
        device=CPU,
        dtype=torch.float32,
    )
    checkpoint.tensors = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if not (name.endswith("_proj.bias") and not mutant.config.attention_bias)
    }
    load_weights(mutant, checkpoint, quantization=read_quantization(checkpoint, asked=None))
    ours, token_ids = PagedModel(mutant, mutant.backend), [2 + each % 95 for each in prompt(90)]
    ours.step([(0, token_ids)])
    assert error(ours.hidden(90), theirs(model, token_ids)) > TOLERANCE


def test_a_decoder_whose_file_denies_causality_sees_the_whole_text() -> None:
    """gte-Qwen2's form; transformers is told by a mask."""
    model = CASES["Qwen2"].tiny()
    checkpoint = as_checkpoint(model)
    checkpoint.hf_config |= {"is_causal": False}
    backend = PagedAttention(block_size=BLOCK_SIZE)
    decoder = load_model(checkpoint, backend=backend, device=CPU, dtype=torch.float32, product=linear_ref)
    ours, token_ids = PagedModel(decoder, backend), prompt(40)
    ours.step([(0, token_ids)])
    with torch.inference_mode():
        mask = torch.zeros(1, 1, 40, 40)
        expected = model(torch.tensor([token_ids]), attention_mask=mask).last_hidden_state[0]
    assert error(ours.hidden(40), expected) < TOLERANCE / 10
    assert error(ours.hidden(40), theirs(model, token_ids)) > TOLERANCE


def test_windows_of_a_decoder_whose_file_denies_causality_are_refused() -> None:
    checkpoint = as_checkpoint(CASES["Mistral"].tiny())
    checkpoint.hf_config |= {"is_causal": False}
    with pytest.raises(CheckpointError, match="'is_causal' is false, beside windows"):
        read_model_config(checkpoint, find_family(checkpoint))
