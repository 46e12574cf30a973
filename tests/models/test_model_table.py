from __future__ import annotations

import pytest

from graphllm.models.registry import FAMILIES
from tests.models.pooled_families import CASES
from tools.update_model_table import MODELS, PROVEN_FAMILIES, with_current_families


def test_table_of_families_is_current() -> None:
    text = MODELS.read_text(encoding="utf-8")
    assert with_current_families(text) == text, "run python -m tools.update_model_table"


def test_an_outdated_table_is_noticed() -> None:
    text = MODELS.read_text(encoding="utf-8")
    changed = text.replace("`Gemma2ForCausalLM`", "`Gemma4ForCausalLM`")
    assert changed != text and with_current_families(changed) == text


def test_a_page_without_the_marks_is_no_place_for_the_table() -> None:
    with pytest.raises(ValueError, match="has no '<!-- families"):
        with_current_families("# Models")


def test_every_architecture_that_is_served_is_proven() -> None:
    served = [name for family in FAMILIES for name in family.architectures]
    proven = {
        name for family in PROVEN_FAMILIES for name in (family.architecture, *family.older_architectures)
    }
    pooled = {case.architecture for case in CASES.values()}
    assert len(served) == len(set(served))
    assert set(served) == proven | pooled
    assert {name for family in FAMILIES if family.pooling for name in family.architectures} == pooled


def test_the_guide_names_every_architecture_of_vectors_and_scores() -> None:
    guide = MODELS.with_name("embeddings.md").read_text(encoding="utf-8")
    for case in CASES.values():
        assert f"`{case.architecture}`" in guide


def test_no_two_families_have_the_same_name() -> None:
    names = [family.name for family in PROVEN_FAMILIES]
    assert len(names) == len(set(names))
