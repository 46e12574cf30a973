"""Logits of a decoder beside those of transformers, as it is and with one thing wrong on purpose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from graphllm.attention.paged import PagedAttention
from graphllm.kernels.linear import linear_ref
from graphllm.models.config import ModelConfig
from graphllm.models.decoder import Decoder
from graphllm.models.registry import find_family, read_model_config
from graphllm.models.weights import load_model, load_weights
from graphllm.quant.unquantized import Unquantized
from tests.models.memory_checkpoint import as_checkpoint
from tests.models.paged_model import BLOCK_SIZE, PagedModel

TOLERANCE = 1e-4  # of the largest logit
CPU = torch.device("cpu")

ConfigMutation = Callable[[ModelConfig], ModelConfig]
WeightMutation = Callable[[Decoder], None]


def prompt(length: int, *, seed: int = 0) -> list[int]:
    return torch.randint(97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def theirs(model: PreTrainedModel, token_ids: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


def paged(model: PreTrainedModel, **options: Any) -> PagedModel:
    backend = PagedAttention(block_size=BLOCK_SIZE)
    settings = {"device": CPU, "dtype": torch.float32, "product": linear_ref} | options
    return PagedModel(load_model(as_checkpoint(model), backend=backend, **settings), backend)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest |logit|; NaN counts as infinite."""
    return float(((found - expected).abs().max() / expected.abs().max()).nan_to_num(torch.inf))


def assert_equal_in_every_split(model: PreTrainedModel) -> None:
    """One prefill, prefill in chunks, and decoding token by token all give transformers' logits."""
    token_ids = prompt(90)
    expected = theirs(model, token_ids)
    ours = paged(model)
    assert error(ours.step([(0, token_ids)]), expected) < TOLERANCE, "in one prefill"
    chunks = [ours.step([(1, token_ids[start : start + 17])]) for start in range(0, 90, 17)]
    assert error(torch.cat(chunks), expected) < TOLERANCE, "in chunks"
    ours.step([(2, token_ids[:83])])
    decoded = [ours.step([(2, [token_id])], num_decode_rows=1) for token_id in token_ids[83:]]
    assert error(torch.cat(decoded), expected[83:]) < TOLERANCE, "token by token"


def mutated_error(
    model: PreTrainedModel,
    *,
    config: ConfigMutation = lambda config: config,
    weights: WeightMutation = lambda model: None,
) -> float:
    """The error at prefill of a decoder whose configuration or loaded weights were tampered with.

    What the mutant has no place for is left out of the checkpoint, so that it loads.
    """
    token_ids = prompt(90)
    checkpoint = as_checkpoint(model)
    family = find_family(checkpoint)
    backend = PagedAttention(block_size=BLOCK_SIZE)
    mutant = Decoder(
        config(read_model_config(checkpoint, family)),
        backend=backend,
        scheme=Unquantized(linear_ref),
        device=CPU,
        dtype=torch.float32,
    )
    if not mutant.config.tie_word_embeddings and model.config.tie_word_embeddings:
        checkpoint.tensors["lm_head.weight"] = torch.randn(model.config.vocab_size, model.config.hidden_size)
    if mutant.config.tie_word_embeddings and not model.config.tie_word_embeddings:
        del checkpoint.tensors["lm_head.weight"]
    if not mutant.config.qk_norm:
        for name in [name for name in checkpoint.tensors if "q_norm" in name or "k_norm" in name]:
            del checkpoint.tensors[name]
    load_weights(mutant, checkpoint, family=family)
    weights(mutant)
    return error(PagedModel(mutant, backend).step([(0, token_ids)]), theirs(model, token_ids))


def neutral_norm(name: str) -> WeightMutation:
    """Every norm of this name without its learned factors."""

    def mutate(model: Decoder) -> None:
        found = [weight for path, weight in model.named_parameters() if path.endswith(f"{name}.weight")]
        assert found, f"the model has no {name}"
        for weight in found:
            weight.fill_(1.0)

    return mutate
