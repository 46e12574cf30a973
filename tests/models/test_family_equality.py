"""Every family equals transformers, and a decoder that ignores one of its switches does not."""

from __future__ import annotations

import pytest

from tests.models.equality import (
    TOLERANCE,
    assert_equal_in_a_mixed_batch,
    assert_equal_in_every_split,
    assert_same_greedy_tokens,
    mutated_error,
)
from tests.models.families import FAMILIES as DENSE_FAMILIES
from tests.models.families import FamilyCases
from tests.models.moe_families import MOE_FAMILIES
from tests.models.text_part_families import TEXT_PART_FAMILIES

FAMILIES = DENSE_FAMILIES + MOE_FAMILIES + TEXT_PART_FAMILIES
VARIANTS = [
    pytest.param(family, variant, id=f"{family.name}: {variant}")
    for family in FAMILIES
    for variant in family.variants
]
CONFIG_MUTANTS = [
    pytest.param(family, mutant, id=f"{family.name}: {mutant}")
    for family in FAMILIES
    for mutant in family.config_mutants
]
WEIGHT_MUTANTS = [
    pytest.param(family, mutant, id=f"{family.name}: {mutant}")
    for family in FAMILIES
    for mutant in family.weight_mutants
]


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_family_equals_transformers(family: FamilyCases, variant: str) -> None:
    model = family.tiny(variant)
    assert_equal_in_every_split(model)
    assert_equal_in_a_mixed_batch(model)
    assert_same_greedy_tokens(model)


@pytest.mark.parametrize(("family", "mutant"), CONFIG_MUTANTS)
def test_a_decoder_that_ignores_a_switch_fails(family: FamilyCases, mutant: str) -> None:
    variant, mutation = family.config_mutants[mutant]
    assert mutated_error(family.tiny(variant), config=mutation) > TOLERANCE


@pytest.mark.parametrize(("family", "mutant"), WEIGHT_MUTANTS)
def test_a_decoder_that_mistakes_a_weight_fails(family: FamilyCases, mutant: str) -> None:
    variant, mutation = family.weight_mutants[mutant]
    assert mutated_error(family.tiny(variant), weights=mutation) > TOLERANCE


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_is_proven_in_at_least_two_variants(family: FamilyCases) -> None:
    assert len(family.variants) >= 2
    assert family.config_mutants
    used = {variant for variant, _ in (*family.config_mutants.values(), *family.weight_mutants.values())}
    assert used <= family.variants.keys()
