from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
import torch

from graphllm.attention.paged import PagedAttention
from graphllm.errors import CheckpointError
from graphllm.kernels.linear import linear_openblas, linear_ref
from graphllm.models.decoder import Decoder
from graphllm.models.weights import choose_product, load_model
from graphllm.quant.unquantized import Unquantized
from tests.models.memory_checkpoint import MemoryCheckpoint, as_checkpoint, tiny_llama

CPU = torch.device("cpu")


def load(checkpoint: MemoryCheckpoint, **options: Any) -> Decoder:
    settings = {"device": CPU, "dtype": torch.float32, "product": linear_ref} | options
    return load_model(checkpoint, backend=PagedAttention(block_size=4), **settings)


def refusal(checkpoint: MemoryCheckpoint) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(checkpoint)
    assert str(checkpoint.path) in caught.value.message
    return caught.value.message


def test_parts_of_a_merged_layer_keep_their_order() -> None:
    checkpoint = as_checkpoint(tiny_llama(attention_bias=True))
    layer = load(checkpoint).layers[1]
    stored = [checkpoint.tensors[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(layer.attention.qkv.weight, torch.cat(stored))
    biases = [checkpoint.tensors[f"model.layers.1.self_attn.{part}_proj.bias"] for part in "qkv"]
    assert torch.equal(layer.attention.qkv.bias, torch.cat(biases))
    gates = [checkpoint.tensors[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(layer.mlp.gate_up.weight, torch.cat(gates))


def test_every_parameter_is_filled_and_none_wants_gradients() -> None:
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    ours = load(as_checkpoint(model))
    assert sum(parameter.numel() for parameter in ours.parameters()) == model.num_parameters()
    total = sum(parameter.double().sum() for parameter in ours.parameters())
    expected = sum(parameter.detach().double().sum() for parameter in model.parameters())
    assert float(total) == pytest.approx(float(expected), abs=1e-6)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert not ours.training


def test_tied_head_is_the_embedding_itself() -> None:
    ours = load(as_checkpoint(tiny_llama(tie_word_embeddings=True)))
    assert ours.head.weight is ours.embedding.weight


def test_at_most_one_tensor_of_the_checkpoint_is_alive() -> None:
    checkpoint = as_checkpoint(tiny_llama())
    load(checkpoint)
    assert checkpoint.most_alive == 1


def test_loading_takes_no_more_memory_than_the_model_and_one_tensor() -> None:
    """In the allocator's own count, with a checkpoint that makes each tensor when it is asked for."""

    class FromNothing(MemoryCheckpoint):
        def tensor(self, name: str) -> torch.Tensor:
            tensor = torch.frombuffer(bytearray(4 * self.tensors[name].numel()), dtype=torch.float32)
            return tensor.view(self.tensors[name].shape)

    model = tiny_llama(vocab_size=512, hidden_size=256, intermediate_size=512)
    stored = as_checkpoint(model)
    checkpoint = FromNothing(
        stored.hf_config, {name: tensor.to("meta") for name, tensor in stored.tensors.items()}
    )
    largest = max(4 * tensor.numel() for tensor in stored.tensors.values())
    tracemalloc.start()  # sees the bytearrays: what the checkpoint handed out
    load(checkpoint)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < largest + 500_000


def test_progress_counts_the_tensors_up_to_all() -> None:
    checkpoint = as_checkpoint(tiny_llama())
    calls: list[tuple[int, int]] = []
    load(checkpoint, progress=lambda done, total: calls.append((done, total)))
    total = len(checkpoint.tensors)
    assert calls == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("served", [torch.float32, torch.bfloat16])
def test_weights_are_converted_to_the_served_format(stored: torch.dtype, served: torch.dtype) -> None:
    checkpoint = as_checkpoint(tiny_llama())
    checkpoint.tensors = {name: tensor.to(stored) for name, tensor in checkpoint.tensors.items()}
    ours = load(checkpoint, dtype=served)
    assert {parameter.dtype for parameter in ours.parameters()} == {served}
    expected = checkpoint.tensors["model.layers.0.mlp.down_proj.weight"].to(served)
    assert torch.equal(ours.layers[0].mlp.down.weight, expected)


def test_missing_tensor_is_named_with_its_file() -> None:
    checkpoint = as_checkpoint(tiny_llama())
    del checkpoint.tensors["model.layers.1.mlp.up_proj.weight"]
    assert "'model.layers.1.mlp.up_proj.weight' is missing" in refusal(checkpoint)


def test_many_missing_tensors_are_counted() -> None:
    checkpoint = as_checkpoint(tiny_llama())
    for name in list(checkpoint.tensors):
        if ".layers.1." in name:
            del checkpoint.tensors[name]
    message = refusal(checkpoint)
    assert "'model.layers.1.input_layernorm.weight'" in message and "and 6 more are missing" in message


def test_untied_head_must_be_there() -> None:
    checkpoint = as_checkpoint(tiny_llama())
    del checkpoint.tensors["lm_head.weight"]
    assert "'lm_head.weight' is missing" in refusal(checkpoint)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",  # a layer beyond the configuration's
        "model.layers.0.self_attn.q_proj.bias",  # a bias the configuration denies
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.mlp.gate_proj.weight_scale",
        "model.layers.0x.rotary_emb.inv_freq",
        "lm_head.bias",
    ],
)
def test_left_over_tensor_is_named_with_its_file(name: str) -> None:
    checkpoint = as_checkpoint(tiny_llama())
    checkpoint.tensors[name] = torch.zeros(4)
    assert f"'{name}' is not used" in refusal(checkpoint)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
)
def test_stored_rotary_frequencies_are_ignored(name: str) -> None:
    checkpoint = as_checkpoint(tiny_llama())
    checkpoint.tensors[name] = torch.zeros(6)
    load(checkpoint)


def test_tied_head_that_is_stored_all_the_same_is_ignored_when_equal() -> None:
    checkpoint = as_checkpoint(tiny_llama(tie_word_embeddings=True))
    checkpoint.tensors["lm_head.weight"] = checkpoint.tensors["model.embed_tokens.weight"].clone()
    load(checkpoint)


@pytest.mark.parametrize("kind", ["another value", "another shape"])
def test_tied_head_that_differs_from_the_embedding_is_refused(kind: str) -> None:
    checkpoint = as_checkpoint(tiny_llama(tie_word_embeddings=True))
    head = checkpoint.tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1
    checkpoint.tensors["lm_head.weight"] = head if kind == "another value" else head[:-1]
    assert "'lm_head.weight' differs from the embedding" in refusal(checkpoint)


@pytest.mark.parametrize("shape", [(48, 81), (47, 80), (48,), (1, 48, 80)])
def test_misshapen_tensor_is_named_with_both_shapes(shape: tuple[int, ...]) -> None:
    checkpoint = as_checkpoint(tiny_llama())
    checkpoint.tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(shape)
    message = refusal(checkpoint)
    assert f"'model.layers.0.mlp.down_proj.weight' has shape {list(shape)}" in message
    assert "[48, 80]" in message


def test_integers_are_not_taken_for_weights() -> None:
    checkpoint = as_checkpoint(tiny_llama())
    checkpoint.tensors["model.norm.weight"] = torch.ones(48, dtype=torch.int8)
    assert "'model.norm.weight' holds int8" in refusal(checkpoint)


def test_nothing_is_read_before_all_names_and_shapes_are_right() -> None:
    checkpoint = as_checkpoint(tiny_llama())
    checkpoint.tensors["model.norm.weight"] = torch.zeros(47)
    refusal(checkpoint)
    assert checkpoint.most_alive == 0


def test_one_library_computes_all_products_of_a_model() -> None:
    ours = load(as_checkpoint(tiny_llama()), product=linear_openblas)
    schemes = [module.scheme for module in ours.modules() if hasattr(module, "scheme")]
    assert len(schemes) == 9
    assert all(isinstance(scheme, Unquantized) for scheme in schemes)
    assert {scheme.product for scheme in schemes} == {linear_openblas}


def test_the_library_is_measured_when_none_is_given() -> None:
    config = load(as_checkpoint(tiny_llama())).config
    assert choose_product(config, device=CPU, dtype=torch.float32) in (linear_ref, linear_openblas)
    assert choose_product(config, device=CPU, dtype=torch.bfloat16) is linear_ref
