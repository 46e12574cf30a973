"""Logits of a decoder beside those of transformers, as it is and with one thing wrong on purpose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from graphllm.attention.paged import PagedAttention
from graphllm.kernels.linear import linear_ref
from graphllm.models.config import ModelConfig
from graphllm.models.decoder import Decoder
from graphllm.models.dummy import fill_random
from graphllm.models.weights import load_model
from graphllm.quant.scheme_source import one_scheme
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


def assert_equal_in_a_mixed_batch(model: PreTrainedModel, **options: Any) -> None:
    """Decodes and prompts in one step, of contexts around a block's length, give transformers' logits."""
    ours = paged(model, **options)
    # Contexts of 1, block - 1, block and block + 1 tokens before the step, some of them then prefilled on.
    prompts = [prompt(length, seed=length) for length in (1, 3, 4, 5, 60, 9, 30)]
    for slot, token_ids in enumerate(prompts[:5]):
        ours.step([(slot, token_ids)])
    rows = [(slot, prompt(1, seed=50 + slot)) for slot in (3, 0, 4, 1)]
    rows += [(2, prompt(6, seed=60)), (5, prompts[5]), (6, prompts[6])]
    logits = ours.step(rows, num_decode_rows=4)
    start = 0
    for slot, token_ids in rows:
        earlier = prompts[slot] if slot < 5 else []
        expected = theirs(model, earlier + token_ids)[len(earlier) :]
        assert error(logits[start : start + len(token_ids)], expected) < TOLERANCE, f"slot {slot}"
        start += len(token_ids)


def assert_same_greedy_tokens(model: PreTrainedModel, *, num_tokens: int = 6) -> None:
    """The most likely tokens, one after the other, and their natural log probabilities."""
    ours, token_ids = paged(model), prompt(20, seed=3)
    logits, logprobs = ours.step([(0, token_ids)])[-1], []
    for _ in range(num_tokens):
        token_id = int(logits.argmax())
        logprobs.append(float(logits.log_softmax(0)[token_id]))
        token_ids.append(token_id)
        logits = ours.step([(0, [token_id])], num_decode_rows=1)[0]
    expected = theirs(model, token_ids)[-num_tokens - 1 : -1]
    chosen = torch.tensor(token_ids[-num_tokens:])
    best, runner_up = expected.topk(2).values.unbind(-1)
    assert (expected.argmax(-1) == chosen)[best - runner_up > 1e-3].all()
    found = torch.tensor(logprobs)
    largest = float(expected.abs().max())
    expected = expected.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
    assert (found - expected).abs().max() < 2 * TOLERANCE * largest


def mutated_error(
    model: PreTrainedModel,
    *,
    config: ConfigMutation = lambda config: config,
    weights: WeightMutation = lambda model: None,
) -> float:
    """The error at prefill of a decoder whose configuration or loaded weights were tampered with.

    What only the mutant has is neutral where there is such a thing, else random.
    """
    token_ids = prompt(90)
    loaded = paged(model).model
    backend = PagedAttention(block_size=BLOCK_SIZE)
    mutant = Decoder(
        config(loaded.config),
        backend=backend,
        schemes=one_scheme(Unquantized(linear_ref)),
        device=CPU,
        dtype=torch.float32,
    )
    fill_random(mutant, seed=0)
    own = dict(loaded.named_parameters())
    for name, parameter in mutant.named_parameters():
        if name.endswith("bias") and name not in own:
            parameter.data.zero_()
        elif name in own and own[name].shape == parameter.shape:
            parameter.data.copy_(own[name])
    weights(mutant)
    return error(PagedModel(mutant, backend).step([(0, token_ids)]), theirs(model, token_ids))


def change(**changes: Any) -> ConfigMutation:
    """Other fields."""
    return lambda config: replace(config, **changes)


def norm(**changes: Any) -> ConfigMutation:
    """Another norm of hidden states."""
    return lambda config: replace(config, norm=replace(config.norm, **changes))


def layers(**changes: Any) -> ConfigMutation:
    """The same change in every layer's own switches."""
    return lambda config: replace(config, layers=tuple(replace(layer, **changes) for layer in config.layers))


def rotary(**changes: Any) -> ConfigMutation:
    """Another way of turning, in all layers that turn."""

    def mutate(config: ModelConfig) -> ModelConfig:
        changed = tuple(
            layer if layer.rotary is None else replace(layer, rotary=replace(layer.rotary, **changes))
            for layer in config.layers
        )
        return replace(config, layers=changed)

    return mutate


def neutral_norm(name: str) -> WeightMutation:
    """Every norm of this name without its learned factors."""

    def mutate(model: Decoder) -> None:
        found = [weight for path, weight in model.named_parameters() if path.endswith(f"{name}.weight")]
        assert found, f"the model has no {name}"
        for weight in found:
            weight.fill_(1.0)

    return mutate
