"""The text part of models that see images as well: its names, and what its section leaves out.

That its logits are those of the whole model is in `test_family_equality.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3Config

from graphllm.attention.paged import PagedAttention
from graphllm.errors import CheckpointError
from graphllm.kernels.linear import linear_ref
from graphllm.models.dummy import DummyCheckpoint
from graphllm.models.registry import find_family, read_model_config
from graphllm.models.weights import load_model
from tests.models.equality import CPU, TOLERANCE, error, prompt, theirs
from tests.models.families import FamilyCases
from tests.models.memory_checkpoint import MemoryCheckpoint, as_checkpoint
from tests.models.paged_model import BLOCK_SIZE, PagedModel
from tests.models.published_text_parts import MISTRAL_SMALL_31, gemma_3
from tests.models.text_part_families import TEXT_PART_FAMILIES

TEXT: dict[str, Any] = MISTRAL_SMALL_31["text_config"]


def loaded(checkpoint: MemoryCheckpoint) -> PagedModel:
    backend = PagedAttention(block_size=BLOCK_SIZE)
    decoder = load_model(checkpoint, backend=backend, device=CPU, dtype=torch.float32, product=linear_ref)
    return PagedModel(decoder, backend)


@pytest.mark.parametrize("family", TEXT_PART_FAMILIES, ids=lambda family: family.name)
def test_both_generations_of_names_are_found(family: FamilyCases) -> None:
    model = family.tiny(next(iter(family.variants)))
    checkpoint, token_ids = as_checkpoint(model), prompt(40)
    older = checkpoint.tensors
    assert "language_model.model.norm.weight" in older and any("vision_tower" in name for name in older)
    newer = {
        name.replace("language_model.model.", "model.language_model.")
        .replace("language_model.lm_head", "lm_head")
        .replace("vision_tower.", "model.vision_tower.")
        .replace("multi_modal_projector.", "model.multi_modal_projector."): tensor
        for name, tensor in older.items()
    }
    expected = theirs(model, token_ids)
    for tensors in (older, newer):
        checkpoint.tensors = tensors
        assert error(loaded(checkpoint).step([(0, token_ids)]), expected) < TOLERANCE
    checkpoint.tensors = newer | {"model.audio_tower.weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"'model.audio_tower.weight' is not used"):
        loaded(checkpoint)


def read(config: dict[str, Any]) -> Any:
    checkpoint = MemoryCheckpoint(config, {})
    return read_model_config(checkpoint, find_family(checkpoint))


def test_what_a_text_part_leaves_out_is_what_its_class_says() -> None:
    sparse = gemma_3(2560, layers=34)
    in_full = Gemma3Config(**{key: sparse[key] for key in ("text_config", "vision_config")}).to_dict()
    config = read(sparse)
    assert config == read(sparse | {"text_config": in_full["text_config"]})
    assert (config.vocab_size, config.head_dim, config.num_heads) == (262208, 256, 8)
    assert config.dtype == torch.bfloat16 and config.eos_token_ids == (1, 106)


def test_random_weights_have_a_tokenizer_of_the_text_parts_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(gemma_3(2560, layers=34)))
    assert DummyCheckpoint(tmp_path).load_tokenizer().vocab_size == 262208


def test_a_tie_may_stand_outside_the_text_part_and_must_not_contradict_it() -> None:
    assert not read(MISTRAL_SMALL_31).tie_word_embeddings
    assert read(MISTRAL_SMALL_31 | {"tie_word_embeddings": True}).tie_word_embeddings
    text = TEXT | {"tie_word_embeddings": False}
    with pytest.raises(CheckpointError, match="'tie_word_embeddings'"):
        read(MISTRAL_SMALL_31 | {"text_config": text, "tie_word_embeddings": True})


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"text_config": None}, "text_config.num_hidden_layers"),
        ({"text_config": "gemma"}, "text_config"),
        ({"text_config": TEXT | {"some_key": 1}}, "text_config.some_key"),
        ({"audio_config": {"hidden_size": 8}}, "audio_config"),
    ],
)
def test_keys_that_are_not_understood_are_named_with_their_section(keys: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=f"'{named}'"):
        read(MISTRAL_SMALL_31 | keys)
