"""A GGUF file speaks as a Hugging Face checkpoint, and one that cannot is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGMLQuantizationType

from graphllm.errors import CheckpointError
from graphllm.models.gguf import GGUFCheckpoint
from tests.models.small_gguf import (
    END_TOKEN_ID,
    HEAD_DIM,
    HIDDEN_SIZE,
    INTERMEDIATE_SIZE,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    TOKENS,
    VOCAB_SIZE,
    small_tensors,
    write_small_llama,
)

LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def permute_for_gguf(values: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """What a converter to GGUF does to q and k: row j of half h of a head becomes row 2j + h."""
    rows_per_head = values.shape[0] // num_heads
    permuted = np.empty_like(values)
    for head in range(num_heads):
        for row in range(rows_per_head):
            half, index = divmod(row, rows_per_head // 2)
            permuted[head * rows_per_head + 2 * index + half] = values[head * rows_per_head + row]
    return permuted


def test_config_says_what_the_metadata_say(tmp_path: Path) -> None:
    checkpoint = GGUFCheckpoint(write_small_llama(tmp_path / "m.gguf"))
    assert checkpoint.hf_config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
        "bos_token_id": END_TOKEN_ID,
        "eos_token_id": END_TOKEN_ID,
    }
    assert checkpoint.generation_config == {"eos_token_id": END_TOKEN_ID}


def test_tensors_have_hugging_face_names_shapes_and_values(tmp_path: Path) -> None:
    tensors = small_tensors(tied=False)
    checkpoint = GGUFCheckpoint(write_small_llama(tmp_path / "m.gguf", tensors=tensors))
    expected = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
        "lm_head.weight": tensors["output.weight"],
    }
    for layer in range(NUM_LAYERS):
        for name, gguf_name in LAYER_NAMES.items():
            expected[f"model.layers.{layer}.{name}"] = tensors[f"blk.{layer}.{gguf_name}"]
    assert set(checkpoint.tensor_names()) == set(expected)
    assert checkpoint.hf_config["tie_word_embeddings"] is False
    for name, values in expected.items():
        assert checkpoint.tensor_shape(name) == values.shape
        if "q_proj" in name:
            values = permute_back(values, NUM_HEADS)
        elif "k_proj" in name:
            values = permute_back(values, NUM_KV_HEADS)
        tensor = checkpoint.tensor(name)
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        np.testing.assert_array_equal(tensor.numpy(), values)


def permute_back(values: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """The inverse of `permute_for_gguf`, found by permuting row numbers."""
    order = permute_for_gguf(np.arange(values.shape[0], dtype=np.float32), num_heads).astype(int)
    return values[np.argsort(order)]


def test_query_and_key_weights_and_biases_get_back_their_order(tmp_path: Path) -> None:
    # What a converter makes of known weights reads as those weights again.
    random = np.random.default_rng(1)
    tensors = small_tensors()
    original = {}
    for name, num_heads in (("attn_q", NUM_HEADS), ("attn_k", NUM_KV_HEADS)):
        for kind, shape in (
            ("weight", (num_heads * HEAD_DIM, HIDDEN_SIZE)),
            ("bias", (num_heads * HEAD_DIM,)),
        ):
            values = random.standard_normal(shape, dtype=np.float32)
            original[f"model.layers.1.self_attn.{name[-1]}_proj.{kind}"] = values
            tensors[f"blk.1.{name}.{kind}"] = permute_for_gguf(values, num_heads)
    checkpoint = GGUFCheckpoint(write_small_llama(tmp_path / "m.gguf", tensors=tensors))
    assert checkpoint.hf_config["attention_bias"] is True
    for name, values in original.items():
        np.testing.assert_array_equal(checkpoint.tensor(name).numpy(), values)


def test_attention_scores_are_those_of_ggml_s_interleaved_rotary(tmp_path: Path) -> None:
    # The reason for the permutation: neighbours turned in the file's order score as halves turned in ours.
    path = write_small_llama(tmp_path / "m.gguf")
    checkpoint, tensors = GGUFCheckpoint(path), small_tensors()
    hidden = np.random.default_rng(2).standard_normal(HIDDEN_SIZE).astype(np.float32)
    angles = 5 * 10000.0 ** (-2 * np.arange(HEAD_DIM // 2) / HEAD_DIM)
    query = (tensors["blk.0.attn_q.weight"] @ hidden)[:HEAD_DIM]
    key = (tensors["blk.0.attn_k.weight"] @ hidden)[:HEAD_DIM]
    turned = (query[0::2] + 1j * query[1::2]) * np.exp(1j * angles)
    interleaved_score = (turned * np.conj(key[0::2] + 1j * key[1::2])).real.sum()
    query = (checkpoint.tensor("model.layers.0.self_attn.q_proj.weight").numpy() @ hidden)[:HEAD_DIM]
    key = (checkpoint.tensor("model.layers.0.self_attn.k_proj.weight").numpy() @ hidden)[:HEAD_DIM]
    first, second = np.split(query, 2)
    turned_first = first * np.cos(angles) - second * np.sin(angles)
    turned_second = first * np.sin(angles) + second * np.cos(angles)
    score = np.concatenate([turned_first, turned_second]) @ key
    assert score == pytest.approx(interleaved_score, rel=1e-5)


@pytest.mark.parametrize(
    ("tensor_type", "dtype", "tolerance"),
    [
        (GGMLQuantizationType.F16, "float16", 2e-3),
        (GGMLQuantizationType.BF16, "bfloat16", 2e-2),
        (GGMLQuantizationType.Q8_0, "bfloat16", 3e-2),
        (GGMLQuantizationType.Q4_1, "bfloat16", 0.3),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_stored_format_shows_in_the_config_and_tensors_come_as_float32(
    tmp_path: Path, tensor_type: GGMLQuantizationType, dtype: str, tolerance: float
) -> None:
    checkpoint = GGUFCheckpoint(write_small_llama(tmp_path / "m.gguf", tensor_type=tensor_type))
    assert checkpoint.hf_config["torch_dtype"] == dtype
    tensor = checkpoint.tensor("model.layers.0.mlp.up_proj.weight")
    assert tensor.dtype == torch.float32
    np.testing.assert_allclose(tensor.numpy(), small_tensors()["blk.0.ffn_up.weight"], atol=tolerance)


def test_permutation_is_undone_on_quantized_rows_too(tmp_path: Path) -> None:
    tensors = small_tensors()
    path = write_small_llama(tmp_path / "m.gguf", tensors=tensors, tensor_type=GGMLQuantizationType.Q8_0)
    tensor = GGUFCheckpoint(path).tensor("model.layers.0.self_attn.q_proj.weight")
    expected = permute_back(tensors["blk.0.attn_q.weight"], NUM_HEADS)
    np.testing.assert_allclose(tensor.numpy(), expected, atol=0.03)


@pytest.mark.parametrize(
    ("metadata", "without", "expected"),
    [
        ({"llama.attention.head_count_kv": [2, 2]}, (), {"num_key_value_heads": 2}),
        ({"llama.attention.key_length": 8, "llama.attention.value_length": 8}, (), {"head_dim": 8}),
        ({}, ("llama.rope.dimension_count",), {"head_dim": 8}),
        ({}, ("llama.rope.freq_base",), {"rope_theta": 10000.0}),
        ({"llama.rope.freq_base": 500000.0}, (), {"rope_theta": 500000.0}),
        ({}, ("llama.vocab_size",), {"vocab_size": VOCAB_SIZE}),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, (), {"rope_scaling": None}),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            (),
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        ),
        ({"llama.rope.scale_linear": 2.0}, (), {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ({"llama.expert_count": 0}, (), {"num_hidden_layers": NUM_LAYERS}),
        ({}, ("tokenizer.ggml.bos_token_id",), {"bos_token_id": None}),
    ],
)
def test_metadata_variant_is_understood(
    tmp_path: Path, metadata: dict[str, Any], without: tuple[str, ...], expected: dict[str, Any]
) -> None:
    config = GGUFCheckpoint(write_small_llama(tmp_path / "m.gguf", metadata, without=without)).hf_config
    assert {key: config.get(key) for key in expected} == expected


def test_key_value_heads_are_as_many_as_query_heads_unless_said_otherwise(tmp_path: Path) -> None:
    path = write_small_llama(tmp_path / "m.gguf", without=("llama.attention.head_count_kv",))
    assert GGUFCheckpoint(path).hf_config["num_key_value_heads"] == NUM_HEADS


def test_every_id_that_ends_a_generation_and_the_sampling_defaults_are_reported(tmp_path: Path) -> None:
    metadata = {
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.ggml.eom_token_id": END_TOKEN_ID,
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 20,
    }
    checkpoint = GGUFCheckpoint(write_small_llama(tmp_path / "m.gguf", metadata))
    assert checkpoint.generation_config == {
        "eos_token_id": [END_TOKEN_ID, 5],
        "temperature": 0.5,
        "top_k": 20,
    }


def test_llama3_rope_factors_are_recognized(tmp_path: Path) -> None:
    # The factors as transformers computes them, from the inverse frequencies of both rules.
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    head_dim = 64
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=131072, rope_parameters=rope)
    scaled, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert attention_factor == 1.0
    plain = 500000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    factors = (plain / scaled).numpy().astype(np.float32)
    assert len(set(factors.round(3).tolist())) > 3, "some frequencies lie between the two ends"

    random = np.random.default_rng(0)
    tensors = small_tensors()
    for layer in range(NUM_LAYERS):
        for name, heads in (("attn_q", NUM_HEADS), ("attn_k", NUM_KV_HEADS)):
            tensors[f"blk.{layer}.{name}.weight"] = random.random((heads * head_dim, HIDDEN_SIZE), np.float32)
    tensors["rope_freqs.weight"] = factors
    metadata = {"llama.rope.freq_base": 500000.0, "llama.rope.dimension_count": head_dim}
    checkpoint = GGUFCheckpoint(write_small_llama(tmp_path / "m.gguf", metadata, tensors=tensors))
    assert checkpoint.hf_config["rope_scaling"] == {
        key: value for key, value in rope.items() if key != "rope_theta"
    }
    assert not any("rope" in name for name in checkpoint.tensor_names())


def test_tokenizer_comes_out_of_the_metadata(tmp_path: Path) -> None:
    tokenizer = GGUFCheckpoint(write_small_llama(tmp_path / "m.gguf")).load_tokenizer()
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert END_TOKEN_ID in tokenizer.eos_token_ids
    assert tokenizer.encode("hi!") == [TOKENS.index("hi"), TOKENS.index("!")]


def without_tensor(name: str) -> dict[str, npt.NDArray[np.float32]]:
    return {key: values for key, values in small_tensors().items() if key != name}


def with_tensor(name: str, values: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
    return {**small_tensors(), name: values}


ZEROS = np.zeros((8, 32), dtype=np.float32)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"no {key}": ({"without": (f"llama.{key}",)}, f"'llama.{key}' is missing")
        for key in (
            "block_count",
            "context_length",
            "embedding_length",
            "feed_forward_length",
            "attention.head_count",
            "attention.layer_norm_rms_epsilon",
        )
    },
    "unknown architecture": (
        {"architecture": "mamba"},
        "'general.architecture' is 'mamba', which is not supp",
    ),
    "key not understood": (
        {"metadata": {"llama.attention.scale": 0.5}},
        "'llama.attention.scale' is not understood",
    ),
    "count as text": (
        {"metadata": {"llama.block_count": "2"}},
        "'llama.block_count' is '2'; it should be a pos",
    ),
    "count of zero": ({"metadata": {"llama.attention.head_count": 0}}, "'llama.attention.head_count' is 0"),
    "count that is a truth value": ({"metadata": {"llama.block_count": True}}, "'llama.block_count' is True"),
    "layers of different widths": (
        {"metadata": {"llama.feed_forward_length": [64, 32]}},
        "'llama.feed_forward_length' differs from layer to layer",
    ),
    "infinite rope base": (
        {"metadata": {"llama.rope.freq_base": float("inf")}},
        "'llama.rope.freq_base' is inf",
    ),
    "experts of unknown number": (
        {"metadata": {"llama.expert_count": 8}},
        "'llama.expert_used_count' is missing",
    ),
    "experts that no layer has": (
        {"metadata": {"llama.expert_count": 8, "llama.expert_used_count": 2}},
        "tensor 'blk.0.ffn_gate.weight' is not one of architecture 'llama'",
    ),
    "one part of several": ({"metadata": {"split.count": 3}}, "'split.count' is 3"),
    "rope scaling of an unknown kind": (
        {"metadata": {"llama.rope.scaling.type": "ntk"}},
        "'llama.rope.scaling.type' is 'ntk'",
    ),
    "rope scaling by divisors that are not there": (
        {"metadata": {"llama.rope.scaling.type": "longrope"}},
        "'llama.rope.scaling.type' is 'longrope', which the tensors of rotary factors contradict",
    ),
    "yarn of an unknown context": (
        {"metadata": {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}},
        "'llama.rope.scaling.original_context_length' is missing",
    ),
    "yarn that extrapolates otherwise": (
        {
            "metadata": {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.yarn_ext_factor": 0.5,
            }
        },
        "'llama.rope.scaling.yarn_ext_factor' is 0.5, which is not supported",
    ),
    "rotary over part of a head": (
        {"metadata": {"llama.attention.key_length": 16}},
        "'llama.rope.dimension_count' differs from the head's 16 dimensions",
    ),
    "values of another length": (
        {"metadata": {"llama.attention.value_length": 16}},
        "'llama.attention.value_length' differs from the head's 8 dimensions",
    ),
    "heads that do not divide the width": (
        {
            "metadata": {"llama.attention.head_count": 5},
            "without": ("llama.rope.dimension_count", "llama.attention.head_count_kv"),
        },
        "'llama.attention.head_count' is 5, which does not divide 32",
    ),
    "another vocabulary size": ({"metadata": {"llama.vocab_size": 300}}, "'llama.vocab_size' disagrees with"),
    "another width": (
        {"metadata": {"llama.embedding_length": 64}},
        "'llama.embedding_length' disagrees with",
    ),
    "too few layers": (
        {"metadata": {"llama.block_count": 3}},
        "'llama.block_count' is 3, but the file has the",
    ),
    "a token too many": (
        {"metadata": {"tokenizer.ggml.tokens": [*TOKENS, "x"]}},
        f"'tokenizer.ggml.tokens' has {VOCAB_SIZE + 1} entries",
    ),
    "end token out of range": (
        {"metadata": {"tokenizer.ggml.eos_token_id": VOCAB_SIZE}},
        f"'tokenizer.ggml.eos_token_id' is {VOCAB_SIZE}, which is no token",
    ),
    "no embedding": (
        {"tensors": without_tensor("token_embd.weight")},
        "no two-dimensional tensor 'token_embd.w",
    ),
    "unknown tensor": (
        {"tensors": with_tensor("blk.0.ssm_in.weight", ZEROS)},
        "tensor 'blk.0.ssm_in.weight' is",
    ),
    "unknown kind of tensor": (
        {"tensors": with_tensor("blk.0.attn_q.scale", ZEROS)},
        "'blk.0.attn_q.scale' is",
    ),
    "layer number with a leading zero": (
        {"tensors": with_tensor("blk.00.attn_q.weight", ZEROS)},
        "tensor 'blk.00.attn_q.weight' is not one of architecture 'llama'",
    ),
    "rope factors of another rule": (
        {"tensors": with_tensor("rope_freqs.weight", np.array([1, 2, 3, 4], dtype=np.float32))},
        "'rope_freqs.weight' does not follow",
    ),
    "rope factors that are zero": (
        {"tensors": with_tensor("rope_freqs.weight", np.zeros(4, dtype=np.float32))},
        "'rope_freqs.weight' does not follow",
    ),
    "rope factors of another length": (
        {"tensors": with_tensor("rope_freqs.weight", np.ones(5, dtype=np.float32))},
        "'rope_freqs.weight' has shape [5], not [4]",
    ),
    "two rope scalings at once": (
        {
            "tensors": with_tensor("rope_freqs.weight", np.ones(4, dtype=np.float32)),
            "metadata": {"llama.rope.scaling.factor": 2.0},
        },
        "'llama.rope.scaling.factor' and the tensor 'rope_freqs.weight' both",
    ),
}


@pytest.mark.parametrize(("arguments", "reason"), REFUSED.values(), ids=REFUSED)
def test_file_that_would_be_misread_is_refused(
    tmp_path: Path, arguments: dict[str, Any], reason: str
) -> None:
    path = write_small_llama(tmp_path / "odd.gguf", **arguments)
    with pytest.raises(CheckpointError) as caught:
        GGUFCheckpoint(path)
    assert str(path) in caught.value.message
    assert reason in caught.value.message


def test_file_without_an_architecture_is_refused(tmp_path: Path) -> None:
    path = write_small_llama(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(b"general.architecture", b"general.architectura"))
    with pytest.raises(CheckpointError, match=r"m\.gguf: metadata key 'general\.architecture' is missing"):
        GGUFCheckpoint(path)


def test_rows_that_heads_cannot_share_are_refused(tmp_path: Path) -> None:
    tensors = with_tensor("blk.0.attn_q.weight", np.zeros((30, HIDDEN_SIZE), dtype=np.float32))
    checkpoint = GGUFCheckpoint(write_small_llama(tmp_path / "m.gguf", tensors=tensors))
    message = r"m\.gguf: tensor 'blk\.0\.attn_q\.weight' has shape \[30, 32\], which does not fit 4 heads"
    for ask in (checkpoint.tensor, checkpoint.tensor_shape):
        with pytest.raises(CheckpointError, match=message):
            ask("model.layers.0.self_attn.q_proj.weight")


def test_unknown_tensor_name_is_an_error_that_names_file_and_tensor(tmp_path: Path) -> None:
    checkpoint = GGUFCheckpoint(write_small_llama(tmp_path / "m.gguf"))
    for ask in (checkpoint.tensor, checkpoint.tensor_shape):
        with pytest.raises(CheckpointError, match=r"m\.gguf: it has no tensor for 'lm_head\.weight'"):
            ask("lm_head.weight")


def test_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    checkpoint = GGUFCheckpoint(write_small_llama(tmp_path / "m.gguf", without=("tokenizer.ggml.model",)))
    with pytest.raises(CheckpointError, match=r"m\.gguf: metadata key 'tokenizer\.ggml\.model' is missing"):
        checkpoint.load_tokenizer()
