"""The routing rule, token by token, in plain Python."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from graphllm.kernels.moe_routing import RoutingRule, moe_routing

RULES: dict[str, RoutingRule] = {
    "softmax": RoutingRule(num_experts=7, top_k=2, scoring="softmax", normalizes=False),
    "softmax, normalized": RoutingRule(num_experts=7, top_k=3, scoring="softmax", normalizes=True),
    "sigmoid": RoutingRule(num_experts=6, top_k=2, scoring="sigmoid", normalizes=False, scale=0.5),
    "sigmoid, normalized": RoutingRule(num_experts=6, top_k=6, scoring="sigmoid", normalizes=True, scale=2.5),
    "groups by their two best": RoutingRule(
        num_experts=12, top_k=3, scoring="sigmoid", normalizes=True, num_groups=4, num_chosen_groups=2
    ),
    "groups by their best": RoutingRule(
        num_experts=12,
        top_k=4,
        scoring="softmax",
        normalizes=False,
        scale=16.0,
        num_groups=3,
        num_chosen_groups=2,
        group_scoring="maximum",
    ),
}


def scores_in_python(logits: list[float], rule: RoutingRule) -> list[float]:
    if rule.scoring == "sigmoid":
        return [1 / (1 + math.exp(-value)) for value in logits]
    exponentials = [math.exp(value) for value in logits]
    return [value / sum(exponentials) for value in exponentials]


def route_in_python(logits: list[float], bias: list[float], rule: RoutingRule) -> dict[int, float]:
    scores = scores_in_python(logits, rule)
    keys = [score + term for score, term in zip(scores, bias, strict=True)]
    size = rule.num_experts // rule.num_groups
    groups = [range(first, first + size) for first in range(0, rule.num_experts, size)]
    num_best = 1 if rule.group_scoring == "maximum" else 2

    def group_score(group: range) -> float:
        return sum(sorted((keys[expert] for expert in group), reverse=True)[:num_best])

    allowed = [
        expert
        for group in sorted(groups, key=group_score, reverse=True)[: rule.num_chosen_groups]
        for expert in group
    ]
    chosen = sorted(allowed, key=lambda expert: (-keys[expert], expert))[: rule.top_k]
    total = sum(scores[expert] for expert in chosen) if rule.normalizes else 1.0
    return {expert: rule.scale * scores[expert] / total for expert in chosen}


def route(logits: torch.Tensor, bias: torch.Tensor | None, rule: RoutingRule, **options: Any) -> Any:
    num_tokens = len(logits)
    experts = torch.full((num_tokens, rule.top_k), -7, dtype=torch.int32)
    weights = torch.full((num_tokens, rule.top_k), torch.nan)
    slots = options.get("slot_mapping", torch.arange(num_tokens))
    moe_routing(logits, bias, slots, rule=rule, experts=experts, weights=weights)
    return experts, weights


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_equals_the_rule_in_python(name: str, has_bias: bool) -> None:
    torch.manual_seed(0)
    rule = RULES[name]
    logits = torch.randn(50, rule.num_experts) * 2
    bias = torch.randn(rule.num_experts) * 0.5 if has_bias else torch.zeros(rule.num_experts)
    experts, weights = route(logits, bias if has_bias else None, rule)
    for row, found_experts, found_weights in zip(
        logits.tolist(), experts.tolist(), weights.tolist(), strict=True
    ):
        expected = route_in_python(row, bias.tolist(), rule)
        assert found_experts == list(expected)
        assert found_weights == pytest.approx(list(expected.values()), rel=1e-5)


def test_the_normalized_softmax_is_the_softmax_of_the_chosen_logits() -> None:
    torch.manual_seed(0)
    logits = torch.randn(20, 9) * 3
    rule = RoutingRule(num_experts=9, top_k=4, scoring="softmax", normalizes=True)
    experts, weights = route(logits, None, rule)
    assert torch.allclose(weights, logits.gather(1, experts.long()).softmax(1), rtol=1e-5)


def test_what_stands_behind_the_experts_logits_is_not_looked_at() -> None:
    torch.manual_seed(0)
    rule = RULES["softmax"]
    logits = torch.randn(5, rule.num_experts + 1)
    logits[:, -1] = torch.nan
    for found, expected in zip(
        route(logits, None, rule), route(logits[:, :-1].contiguous(), None, rule), strict=True
    ):
        assert torch.equal(found, expected)


def test_padding_tokens_go_nowhere() -> None:
    rule = RULES["softmax"]
    logits = torch.randn(4, rule.num_experts)
    logits[2] = torch.nan
    experts, weights = route(logits, None, rule, slot_mapping=torch.tensor([5, -1, -1, 0]))
    assert (experts[1:3] == -1).all() and (weights[1:3] == 0).all()
    assert (experts[[0, 3]] >= 0).all() and (weights[[0, 3]] > 0).all()


@pytest.mark.parametrize("name", RULES)
def test_a_nan_stays_with_its_token_and_numbers_stay_in_range(name: str) -> None:
    rule = RULES[name]
    logits = torch.zeros(3, rule.num_experts)
    logits[1] = torch.nan
    experts, weights = route(logits, None, rule)
    assert ((experts >= 0) & (experts < rule.num_experts)).all()
    assert weights[1].isnan().all() and weights[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"top_k": 0}, "0 experts from 1 groups of 8"),
        ({"top_k": 9}, "9 experts from 1 groups of 8"),
        ({"num_experts": 0}, "0 experts, not 1 to 512"),
        ({"num_experts": 1024}, "1024 experts, not 1 to 512"),
        ({"num_groups": 3}, "1 of 3 groups of 8"),
        ({"num_groups": 4, "num_chosen_groups": 5}, "5 of 4 groups of 8"),
        ({"num_groups": 4, "num_chosen_groups": 1, "top_k": 3}, "3 experts from 1 groups of 2"),
        ({"num_groups": 8, "num_chosen_groups": 4}, "no two best"),
    ],
)
def test_rules_that_cannot_be_followed_are_refused(fields: dict[str, Any], complaint: str) -> None:
    valid: dict[str, Any] = {"num_experts": 8, "top_k": 2, "scoring": "softmax", "normalizes": False}
    RoutingRule(**valid)
    with pytest.raises(ValueError, match=complaint):
        RoutingRule(**(valid | fields))
