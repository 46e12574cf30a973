"""Published models are read as they are: every key of their files is understood, and their sizes come out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphllm.attention.paged import PagedAttention
from graphllm.errors import CheckpointError
from graphllm.kernels.linear import linear_ref
from graphllm.layers.rotary import YarnRopeScaling
from graphllm.models.config import LayerConfig, ModelConfig
from graphllm.models.decoder import Decoder
from graphllm.models.quantization import read_quantization
from graphllm.models.registry import FAMILIES, find_family, read_model_config
from graphllm.models.weights import check_sizes
from graphllm.quant.scheme_source import one_scheme
from graphllm.quant.unquantized import Unquantized
from tests.models.memory_checkpoint import MemoryCheckpoint
from tests.models.published_configs import PUBLISHED_MODELS
from tests.models.published_model import PublishedModel
from tests.models.published_moe_configs import DEEPSEEK_V3_671B
from tests.models.published_older_configs import FIRST_FALCON_MODELS
from tests.models.published_tensors import PUBLISHED_TENSORS, PublishedTensors

NOWHERE = torch.device("meta")
BY_NAME = {model.name: model for model in PUBLISHED_MODELS}


def read(config: dict[str, Any]) -> ModelConfig:
    checkpoint = MemoryCheckpoint(config, {})
    return read_model_config(checkpoint, find_family(checkpoint))


def read_published(name: str, **keys: Any) -> ModelConfig:
    return read(BY_NAME[name].config | keys)


def num_parameters(config: ModelConfig) -> int:
    """Counted in a decoder with one layer of each kind, to be quick."""
    outline = config.one_layer_of_each_kind()
    decoder = Decoder(
        outline,
        backend=PagedAttention(block_size=16),
        schemes=one_scheme(Unquantized(linear_ref)),
        device=NOWHERE,
        dtype=torch.bfloat16,
    )
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in decoder.layers]
    by_kind = dict(zip(outline.layers, sizes, strict=True))
    outside = sum(parameter.numel() for parameter in decoder.parameters()) - sum(sizes)
    # An embedding of texts in pairs has the vocabulary once for each type of token.
    num_repeats = max(0, config.num_used_token_types - 1)
    outside -= num_repeats * (config.vocab_size // (1 + num_repeats)) * config.hidden_size
    return outside + sum(by_kind[layer] for layer in config.layers)


@pytest.mark.parametrize("model", PUBLISHED_MODELS, ids=lambda model: model.name)
def test_published_model_is_read_and_has_its_size(model: PublishedModel) -> None:
    config = read(model.config)
    assert num_parameters(config) == pytest.approx(model.num_parameters, rel=0.01)


def test_table_has_a_model_of_every_architecture_that_is_published() -> None:
    served = {name for family in FAMILIES for name in family.architectures}
    listed = {model.config["architectures"][0] for model in PUBLISHED_MODELS}
    # Ministral's models of 2024 call themselves Mistral, those of 2025 are text parts; the architectures came
    # later; Falcon's first name is below. The rest is what transformers calls a listed decoder without its
    # head, of which no model is at hand that many serve.
    assert served - listed == {
        "MinistralForCausalLM",
        "Ministral3ForCausalLM",
        "RWForCausalLM",
        "LlamaModel",
        "GemmaModel",
        "Qwen3Model",
        "Gemma3TextForSequenceClassification",
    }


def as_stored(tensors: PublishedTensors) -> MemoryCheckpoint:
    """The published configuration and tensors, of which there are names and shapes alone."""
    config = BY_NAME[tensors.name].config
    shapes = tensors.shapes(read(config).num_layers)
    stored = {name: torch.empty(shape, device=NOWHERE) for name, shape in shapes.items()}
    return MemoryCheckpoint(config, stored)


def check(checkpoint: MemoryCheckpoint) -> None:
    family = find_family(checkpoint)
    config = read_model_config(checkpoint, family)
    quantization = read_quantization(checkpoint, asked=None)
    check_sizes(config, checkpoint, quantization=quantization, backend=PagedAttention(block_size=16))


@pytest.mark.parametrize("tensors", PUBLISHED_TENSORS, ids=lambda tensors: tensors.name)
def test_published_tensors_are_those_that_are_asked_for(tensors: PublishedTensors) -> None:
    checkpoint = as_stored(tensors)
    check(checkpoint)
    checkpoint.tensors["model.layers.0.weight_nobody_knows"] = torch.empty(1, device=NOWHERE)
    with pytest.raises(CheckpointError, match="weight_nobody_knows"):
        check(checkpoint)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("openai-community/gpt2", "h.0.attn.bias_scale"),
        ("tiiuae/falcon-7b", "lm_head.weight_scale"),
        ("EleutherAI/pythia-70m", "gpt_neox.layers.0.attention.bias.weight"),
    ],
)
def test_names_that_only_begin_like_what_is_ignored_are_refused(model: str, name: str) -> None:
    (tensors,) = (tensors for tensors in PUBLISHED_TENSORS if tensors.name == model)
    checkpoint = as_stored(tensors)
    checkpoint.tensors[name] = torch.empty(1, device=NOWHERE)
    with pytest.raises(CheckpointError, match=f"'{name}' is not used"):
        check(checkpoint)


def windows(config: ModelConfig) -> list[int | None]:
    return [layer.sliding_window for layer in config.layers]


def rotary_dims(config: ModelConfig) -> set[int | None]:
    return {None if layer.rotary is None else layer.rotary.rotary_dim for layer in config.layers}


def is_stretched(layer: LayerConfig) -> bool:
    return layer.rotary is not None and isinstance(layer.rotary.scaling, YarnRopeScaling)


def test_published_windows_are_where_they_belong() -> None:
    assert windows(read_published("mistralai/Mistral-7B-v0.1")) == [4096] * 32
    assert windows(read_published("mistralai/Mistral-7B-Instruct-v0.3")) == [None] * 32
    assert windows(read_published("Qwen/Qwen2.5-7B")) == [None] * 28
    assert windows(read_published("google/gemma-2-2b-it")) == [4096, None] * 13
    assert windows(read_published("google/gemma-3-1b-it")) == ([512] * 5 + [None]) * 4 + [512] * 2
    assert windows(read_published("google/gemma-3-270m")) == ([512] * 5 + [None]) * 3
    assert windows(read_published("CohereForAI/c4ai-command-r7b-12-2024")) == ([4096] * 3 + [None]) * 8
    assert windows(read_published("openai/gpt-oss-20b")) == [128, None] * 12


def test_published_heads_turn_as_far_as_they_were_trained_to() -> None:
    assert rotary_dims(read_published("microsoft/phi-2")) == {32}
    assert rotary_dims(read_published("microsoft/phi-1, an earlier version")) == {32}
    assert rotary_dims(read_published("microsoft/Phi-4-mini-instruct")) == {96}
    assert rotary_dims(read_published("EleutherAI/pythia-70m")) == {16}
    assert rotary_dims(read_published("togethercomputer/RedPajama-INCITE-Chat-3B-v1")) == {80}
    assert rotary_dims(read_published("stabilityai/stablelm-2-1_6b")) == {16}
    assert rotary_dims(read_published("THUDM/glm-4-9b-chat-hf")) == {64}
    assert rotary_dims(read_published("CohereForAI/c4ai-command-r7b-12-2024")) == {128, None}
    assert rotary_dims(read_published("tiiuae/falcon-rw-1b")) == {None}
    smollm = read_published("HuggingFaceTB/SmolLM3-3B")
    assert [layer.rotary is None for layer in smollm.layers] == [False, False, False, True] * 9


def test_published_olmo_3_stretches_full_layers_alone() -> None:
    config = read_published("allenai/Olmo-3-7B-Instruct")
    assert [is_stretched(layer) for layer in config.layers] == [False, False, False, True] * 8


def test_falcon_7b_has_one_key_head_whatever_its_file_counts() -> None:
    assert read_published("tiiuae/falcon-7b").num_kv_heads == 1
    assert read_published("tiiuae/falcon-40b").num_kv_heads == 8
    assert read_published("tiiuae/falcon-rw-1b").num_kv_heads == 32


@pytest.mark.parametrize("first", FIRST_FALCON_MODELS, ids=lambda model: model.name)
def test_first_files_of_falcon_mean_what_later_ones_do(first: PublishedModel) -> None:
    assert read(first.config) == read_published(first.name)


def test_context_of_dual_chunk_attention_ends_with_the_first_chunk() -> None:
    name = "Qwen/Qwen2.5-7B-Instruct-1M"
    assert read_published(name).max_position_embeddings == 262144 - 8192
    assert read_published(name, max_position_embeddings=65536).max_position_embeddings == 65536
    assert read_published(name, dual_chunk_attention_config=None).max_position_embeddings == 1010000


def test_distillate_of_r1_is_not_sharpened() -> None:
    """Its file takes back with `attn_factor` what yarn would do to the scores."""
    config = read_published("deepseek-ai/DeepSeek-R1-0528-Qwen3-8B")
    rotary = config.layers[0].rotary
    assert rotary is not None and isinstance(rotary.scaling, YarnRopeScaling)
    assert rotary.scaling.attention_factor == pytest.approx(1.0)


CHUNKS = {"chunk_size": 262144, "local_size": 8192}


@pytest.mark.parametrize(
    ("name", "keys", "named"),
    [
        ("microsoft/phi-2", {"rotary_dim": 80}, "rotary_dim"),
        ("openai-community/gpt2-medium", {"n_special": 3}, "n_special"),
        ("facebook/opt-1.3b", {"scale_embeddings": True}, "scale_embeddings"),
        ("facebook/opt-1.3b", {"learned_embeddings": False}, "learned_embeddings"),
        ("bigcode/starcoder2-7b", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ("bigcode/starcoder2-7b", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("Qwen/CodeQwen1.5-7B-Chat", {"rotary_emb_base": 10000}, "rotary_emb_base"),
        ("Qwen/Qwen3-Coder-30B-A3B-Instruct", {"qkv_bias": True}, "qkv_bias"),
        ("Qwen/Qwen3-Coder-30B-A3B-Instruct", {"use_qk_norm": False}, "use_qk_norm"),
        (
            "Qwen/Qwen3-Coder-30B-A3B-Instruct",
            {"shared_expert_intermediate_size": 768},
            "shared_expert_intermediate_size",
        ),
        (
            "Qwen/Qwen2.5-7B-Instruct-1M",
            {"dual_chunk_attention_config": CHUNKS | {"local_size": 262144}},
            "dual_chunk_attention_config.local_size",
        ),
        (
            "Qwen/Qwen2.5-7B-Instruct-1M",
            {"dual_chunk_attention_config": CHUNKS | {"wraps_around": True}},
            "dual_chunk_attention_config.wraps_around",
        ),
        (
            "Qwen/Qwen2.5-7B-Instruct-1M",
            {"dual_chunk_attention_config": [8192]},
            "dual_chunk_attention_config",
        ),
    ],
)
def test_the_same_file_that_means_another_model_is_refused(
    name: str, keys: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError, match=f"'{named}'"):
        read_published(name, **keys)


@pytest.mark.parametrize(
    ("packing", "complaint"),
    [
        ({"bits": 4, "quant_method": "unheard-of"}, "quant_method' is 'unheard-of', not one of awq"),
        ({"bits": 4}, "quant_method' is missing"),
    ],
)
def test_packing_that_nobody_understands_is_refused(packing: dict[str, Any], complaint: str) -> None:
    for config in (DEEPSEEK_V3_671B, BY_NAME["meta-llama/Llama-3.1-8B-Instruct"].config):
        packed = MemoryCheckpoint(config | {"quantization_config": packing}, {})
        with pytest.raises(CheckpointError, match=complaint):
            read_quantization(packed, asked=None)
