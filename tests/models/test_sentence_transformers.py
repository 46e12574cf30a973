"""What sentence-transformers' files say is read, and what would be another vector is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graphllm.errors import CheckpointError
from graphllm.models.pooling import PoolingConfig, load_pooler, read_pooling
from graphllm.models.registry import find_family, read_model_config
from graphllm.models.safetensors_folder import FolderCheckpoint
from graphllm.models.sentence_transformers import read_sentence_transformer
from tests.models.equality import CPU
from tests.pooled_models import write_json, write_model, write_sentence_transformer

MEAN = {"pooling_mode_mean_tokens": True}
FILES = {
    "modules": "modules.json",
    "pooling": "1_Pooling/config.json",
    "dense": "2_Dense/config.json",
    "length": "sentence_bert_config.json",
    "settings": "config_sentence_transformers.json",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """EmbeddingGemma's files, but for the model."""
    write_sentence_transformer(
        tmp_path,
        pooling=MEAN | {"include_prompt": True, "pooling_mode_cls_token": False},
        dense=[(32, 64, "linear.Identity"), (64, 32, "activation.Tanh")],
        max_seq_length=2048,
        settings={
            "__version__": {"sentence_transformers": "5.1.0"},
            "model_type": "SentenceTransformer",
            "prompts": {"query": "task: search result | query: ", "document": "title: none | text: "},
            "default_prompt_name": "document",
            "similarity_fn_name": "dot",
        },
    )
    return tmp_path


def change(folder: Path, file: str, **keys: Any) -> None:
    path = folder / FILES[file]
    write_json(path, json.loads(path.read_text()) | keys)


def test_everything_that_is_honoured_is_read(folder: Path) -> None:
    found = read_sentence_transformer(folder)
    assert (found.method, found.normalizes, found.max_tokens) == ("mean", True, 2048)
    assert [(each.folder, each.out_features, each.has_tanh) for each in found.dense] == [
        ("2_Dense", 64, False),
        ("3_Dense", 32, True),
    ]
    assert found.prompts["query"] == "task: search result | query: "
    assert (found.default_prompt, found.similarity) == ("document", "dot")


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"pooling_mode_cls_token": True}, "first"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "mean", "embedding_dimension": 32}, "mean"),
        ({}, "mean"),
    ],
)
def test_pooling_is_written_in_two_ways(tmp_path: Path, config: dict[str, Any], method: str) -> None:
    write_sentence_transformer(tmp_path, pooling=config)
    assert read_sentence_transformer(tmp_path).method == method


def test_files_that_may_be_missing(tmp_path: Path) -> None:
    write_sentence_transformer(tmp_path, pooling=MEAN, normalizes=False)
    (tmp_path / "sentence_bert_config.json").rename(tmp_path / "sentence_roberta_config.json")
    change_length = {"max_seq_length": 128, "do_lower_case": True}
    write_json(tmp_path / "sentence_roberta_config.json", change_length)
    found = read_sentence_transformer(tmp_path)
    assert (found.normalizes, found.max_tokens, found.lowercases) == (False, 128, True)
    assert (found.prompts, found.default_prompt, found.similarity) == ({}, None, "cosine")


def test_files_as_version_6_writes_them(folder: Path) -> None:
    """Other module names, the length with the tokenizer, and notes of what modules read and write."""
    names = [
        "base.modules.transformer.Transformer",
        "sentence_transformer.modules.pooling.Pooling",
        "base.modules.dense.Dense",
        "base.modules.dense.Dense",
        "base.modules.normalize.Normalize",
    ]
    modules = json.loads((folder / "modules.json").read_text())
    for entry, name in zip(modules, names, strict=True):
        entry["type"] = f"sentence_transformers.{name}"
    write_json(folder / "modules.json", modules)
    places = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
    change(folder, "dense", **places)
    states = {"method": "forward", "method_output_name": "last_hidden_state"}
    length = {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": states},
        "module_output_name": "token_embeddings",
    }
    write_json(folder / FILES["length"], length)
    write_json(folder / "tokenizer_config.json", {"model_max_length": 77})
    found = read_sentence_transformer(folder)
    assert (found.method, found.max_tokens, len(found.dense)) == ("mean", 77, 2)
    write_json(folder / "tokenizer_config.json", {"model_max_length": 10**30})
    assert read_sentence_transformer(folder).max_tokens is None


@pytest.mark.parametrize(
    ("file", "keys", "message"),
    [
        (
            "pooling",
            {"pooling_mode_max_tokens": True},
            "asks for pooling_mode_mean_tokens and pooling_mode_max",
        ),
        ("pooling", {"pooling_mode_mean_tokens": False}, "asks for no pooling"),
        ("pooling", {"pooling_mode_weightedmean_tokens": True}, "'pooling_mode_weightedmean_tokens' .* not"),
        ("pooling", {"pooling_mode": "attention"}, "'pooling_mode' is 'attention'; supported are cls"),
        ("pooling", {"include_prompt": False}, "'include_prompt' is false"),
        ("pooling", {"pooling_mode_mean_tokens": "yes"}, "is 'yes', not true or false"),
        ("dense", {"activation_function": "torch.nn.GELU"}, "'activation_function' is 'torch.nn.GELU'"),
        ("dense", {"module_input_name": "token_embeddings"}, "'module_input_name' is 'token_embeddings'"),
        ("length", {"transformer_task": "fill-mask"}, "'transformer_task' is 'fill-mask'"),
        ("length", {"modality_config": {"image": {}}}, "'modality_config' is"),
        ("dense", {"in_features": None}, "'in_features' is missing"),
        ("dense", {"out_features": 0}, "'out_features' is 0, not a positive integer"),
        ("dense", {"use_residual": True}, "'use_residual' .* is not understood"),
        ("length", {"max_seq_length": "long"}, "'max_seq_length' is 'long'"),
        ("length", {"do_lower_case": 1}, "'do_lower_case' is 1, not true or false"),
        ("settings", {"prompts": ["query"]}, "'prompts' is no object of texts"),
        ("settings", {"default_prompt_name": "poem"}, "'default_prompt_name' is 'poem', which"),
        ("settings", {"similarity_fn_name": "jaccard"}, "'similarity_fn_name' is 'jaccard'"),
        ("settings", {"model_type": "SparseEncoder"}, "'model_type' is 'SparseEncoder'"),
        ("settings", {"truncate_dim": 64}, "'truncate_dim' .* is not understood"),
    ],
)
def test_what_would_be_another_vector_is_refused(
    folder: Path, file: str, keys: dict[str, Any], message: str
) -> None:
    change(folder, file, **keys)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_sentence_transformer(folder)
    assert str(folder / FILES[file]) in caught.value.message


def module(kind: str, path: str = "", package: str = "sentence_transformers.models.") -> dict[str, Any]:
    return {"idx": 0, "name": "0", "path": path, "type": f"{package}{kind}"}


TRANSFORMER, POOLING = module("Transformer"), module("Pooling", "1_Pooling")


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([], "is not a list of modules"),
        ([TRANSFORMER], "has the modules Transformer; what is supported is"),
        ([module("StaticEmbedding")], "has the modules StaticEmbedding"),
        (
            [TRANSFORMER, POOLING, module("LayerNorm", "2_LayerNorm")],
            "the module LayerNorm in '2_LayerNorm', which is not supported",
        ),
        ([TRANSFORMER, POOLING, module("Normalize", "2"), module("Dense", "2_Dense")], "has the modules"),
        ([module("Transformer", package="custom_st."), POOLING], "'custom_st.Transformer', which is code"),
        ([module("Transformer", "0_Transformer"), POOLING], "keeps the model in '0_Transformer'"),
        ([TRANSFORMER, module("Pooling", "../1_Pooling")], "which lies outside"),
        ([{"type": "x"}], "has no 'path' and 'type'"),
    ],
)
def test_other_modules_are_refused(folder: Path, modules: list[dict[str, Any]], message: str) -> None:
    write_json(folder / "modules.json", modules)
    with pytest.raises(CheckpointError, match=message):
        read_sentence_transformer(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_files_that_are_no_json_are_refused(folder: Path, content: bytes) -> None:
    (folder / "1_Pooling/config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"1_Pooling/config.json: cannot be read"):
        read_sentence_transformer(folder)
    (folder / "1_Pooling/config.json").unlink()
    with pytest.raises(CheckpointError, match=r"1_Pooling/config.json: is missing"):
        read_sentence_transformer(folder)


def pooling_of(folder: Path) -> PoolingConfig:
    checkpoint = FolderCheckpoint(folder)
    family = find_family(checkpoint)
    found = read_pooling(checkpoint, family, read_model_config(checkpoint, family))
    load_pooler(checkpoint, found, tokenizer=checkpoint.load_tokenizer(), device=CPU)
    return found


def test_pooling_of_another_models_states_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "BertModel")
    write_sentence_transformer(tmp_path, pooling=MEAN)
    for key in ("word_embedding_dimension", "embedding_dimension"):
        write_json(tmp_path / FILES["pooling"], MEAN | {key: 33})
        with pytest.raises(CheckpointError, match="of states of 33 numbers, and the model's have 32"):
            pooling_of(tmp_path)
        change(tmp_path, "pooling", **{key: 32})
        assert pooling_of(tmp_path).output_size == 32
    change(tmp_path, "pooling", embedding_dimension="32")
    with pytest.raises(CheckpointError, match=r"1_Pooling/config.json: .*'embedding_dimension' is '32'"):
        pooling_of(tmp_path)


def test_weights_of_layers_behind_pooling_are_checked(tmp_path: Path) -> None:
    write_model(tmp_path, "BertModel")
    write_sentence_transformer(tmp_path, pooling=MEAN, dense=[(32, 8, "linear.Identity")])
    assert pooling_of(tmp_path).output_size == 8
    change(tmp_path, "dense", out_features=9)
    with pytest.raises(CheckpointError, match=r"2_Dense: the weight has shape \[8, 32\]; \[9, 32\]"):
        pooling_of(tmp_path)
    change(tmp_path, "dense", in_features=16)
    with pytest.raises(CheckpointError, match="2_Dense takes 16 numbers, and 32 come before it"):
        pooling_of(tmp_path)
    change(tmp_path, "dense", in_features=32, bias=False)
    with pytest.raises(
        CheckpointError, match=r"it has the tensors linear.bias, linear.weight; linear.weight"
    ):
        pooling_of(tmp_path)
    (tmp_path / "2_Dense/model.safetensors").write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match=r"2_Dense/model.safetensors: cannot be read"):
        pooling_of(tmp_path)
    (tmp_path / "2_Dense/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"2_Dense/model.safetensors: no such file"):
        pooling_of(tmp_path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "'id2label' has 3 labels, and 1 scores"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.ReLU"}}, "asks for 'torch.nn.ReLU'"),
        (
            {"sbert_ce_default_activation_function": "x"},
            "'sbert_ce_default_activation_function' asks for 'x'",
        ),
        ({"position_embedding_type": "relative_key"}, "'position_embedding_type' is 'relative_key'"),
        ({"is_decoder_of": 1}, "'is_decoder_of' .* is not understood"),
    ],
)
def test_scores_that_would_be_others_are_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    write_model(tmp_path, "BertForSequenceClassification", num_labels=1)
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | keys)
    with pytest.raises(CheckpointError, match=message):
        pooling_of(tmp_path)


def test_sizes_that_vectors_may_be_cut_to(tmp_path: Path) -> None:
    write_model(tmp_path, "BertModel")
    config = json.loads((tmp_path / "config.json").read_text())
    for keys, expected in (
        ({}, (False, ())),
        ({"is_matryoshka": True}, (True, ())),
        ({"matryoshka_dimensions": [16, 8]}, (True, (8, 16))),
    ):
        write_json(tmp_path / "config.json", config | keys)
        found = pooling_of(tmp_path)
        assert (found.can_be_cut, found.sizes) == expected
    write_json(tmp_path / "config.json", config | {"matryoshka_dimensions": [0]})
    with pytest.raises(CheckpointError, match="'matryoshka_dimensions' is"):
        pooling_of(tmp_path)
