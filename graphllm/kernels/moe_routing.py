"""Which experts a token goes to, and with which weight (Shazeer et al., 2017, arXiv:1701.06538).

    s_e = softmax(l)_e  or  sigmoid(l_e)               l the router's logits of a token
    g   = the num_chosen_groups best groups of neighbouring experts
    c   = the top_k experts of those groups with the largest s_e + b_e, the largest first
    w_e = scale * s_e,  or with normalizes  scale * s_e / sum of s over c

A group's score is its largest s_e + b_e (DeepSeek-V2, arXiv:2405.04434), or the sum of its two largest
(DeepSeek-V3, arXiv:2412.19437). b is a bias that balances the experts' load: it takes part in the choice and
not in the weight. A softmax over the logits of the chosen experts alone is the softmax with normalizes.

Owns the rule and the choice. Which tokens an expert then gets is `moe_tiles.py`'s. Padding tokens go nowhere:
their expert is -1 and their weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.triton_support import (
    launch_options,
    release_successor,
    runs_triton,
    wait_for_predecessor,
)

RouterScoring = Literal["softmax", "sigmoid"]
GroupScoring = Literal["maximum", "two_best"]

MAX_EXPERTS = 512
"""A token's scores live in the registers of one warp."""

# Sigmoids can all be zero; a softmax's chosen ones never sum to less than 1 / num_experts.
_LEAST_SUM: tl.constexpr = tl.constexpr(1e-20)
# Far below all logits, and finite: where a row holds nothing but NaN, this is its maximum.
_NO_LOGIT: tl.constexpr = tl.constexpr(-1e30)
# A warp each, so that no reduction leaves its warp.
_TOKENS = 4
_NUM_WARPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRule:
    """The rule of a layer's router, see the module's formula.

    num_groups divides num_experts, and the chosen groups hold at least top_k experts. Raises ValueError.
    """

    num_experts: int
    top_k: int
    scoring: RouterScoring
    normalizes: bool
    scale: float = 1.0
    num_groups: int = 1
    num_chosen_groups: int = 1
    group_scoring: GroupScoring = "two_best"

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            raise ValueError(f"{self.num_experts} experts, not 1 to {MAX_EXPERTS}")
        if not 1 <= self.num_chosen_groups <= self.num_groups or self.num_experts % self.num_groups:
            raise ValueError(f"{self.num_chosen_groups} of {self.num_groups} groups of {self.num_experts}")
        if not 1 <= self.top_k <= self.num_chosen_groups * self.group_size:
            raise ValueError(
                f"{self.top_k} experts from {self.num_chosen_groups} groups of {self.group_size}"
            )
        if self.limits_groups and self.group_scoring == "two_best" and self.group_size < 2:
            raise ValueError("groups of one expert have no two best")

    @property
    def group_size(self) -> int:
        return self.num_experts // self.num_groups

    @property
    def limits_groups(self) -> bool:
        return self.num_chosen_groups < self.num_groups


def moe_routing_ref(
    logits: Tensor,
    selection_bias: Tensor | None,
    slot_mapping: Tensor,
    *,
    rule: RoutingRule,
    experts: Tensor,
    weights: Tensor,
) -> None:
    """Write each token's experts and weights, the best first, the lower number among equals.

    logits: [num_tokens, at least num_experts] float32, what stands behind the experts' is not looked at.
    selection_bias: [num_experts] float32. slot_mapping: [num_tokens] int64, negative for padding tokens.
    experts: [num_tokens, top_k] int32 and weights: [num_tokens, top_k] float32 are written. A NaN among a
    token's logits makes its weights NaN, and no expert's number is ever out of range.
    """
    logits = logits[:, : rule.num_experts]
    scores = logits.softmax(1) if rule.scoring == "softmax" else logits.sigmoid()
    keys = scores if selection_bias is None else scores + selection_bias
    keys = keys.masked_fill(keys.isnan(), -torch.inf)
    if rule.limits_groups:
        keys = _within_chosen_groups(keys, rule)
    # Sorted and not `topk`, which promises no order among equals.
    chosen = torch.sort(keys, dim=1, descending=True, stable=True).indices[:, : rule.top_k]
    weights.copy_(scores.gather(1, chosen))
    if rule.normalizes:
        weights.div_(weights.sum(1, keepdim=True).add_(_LEAST_SUM.value))
    weights.mul_(rule.scale)
    is_padding = slot_mapping[:, None] < 0
    weights.masked_fill_(is_padding, 0.0)
    experts.copy_(chosen.masked_fill(is_padding, -1))


def _within_chosen_groups(keys: Tensor, rule: RoutingRule) -> Tensor:
    """keys [num_tokens, num_experts], with -inf for the experts of groups that are not chosen."""
    grouped = keys.view(-1, rule.num_groups, rule.group_size)
    num_best = 1 if rule.group_scoring == "maximum" else 2
    group_scores = grouped.topk(num_best, 2).values.sum(2)
    best = torch.sort(group_scores, dim=1, descending=True, stable=True).indices[:, : rule.num_chosen_groups]
    is_out = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
    return grouped.masked_fill(is_out[:, :, None], -torch.inf).flatten(1)


@triton.jit
def _first_best(keys, columns, SIZE: tl.constexpr):
    """(largest key, its first column) of each row of [TOKENS, SIZE]."""
    best = tl.max(keys, 1)
    return best, tl.min(tl.where(keys == best[:, None], columns[None, :], SIZE), 1)


@triton.jit
def _keep_chosen_groups(
    keys,
    columns,
    TOKENS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ADDS_SECOND: tl.constexpr,
):
    """keys with -inf for the experts of groups that are not among the best."""
    groups = tl.arange(0, GROUPS_PADDED)
    group_of = columns // GROUP_SIZE
    group_scores = tl.full((TOKENS, GROUPS_PADDED), float("-inf"), tl.float32)
    for group in tl.static_range(NUM_GROUPS):
        members = tl.where((group_of == group)[None, :], keys, float("-inf"))
        score, first = _first_best(members, columns, EXPERTS_PADDED)
        if ADDS_SECOND:
            score += tl.max(tl.where(columns[None, :] == first[:, None], float("-inf"), members), 1)
        group_scores = tl.where((groups == group)[None, :], score[:, None], group_scores)
    is_kept = tl.zeros((TOKENS, EXPERTS_PADDED), tl.int32)
    for _ in tl.static_range(NUM_CHOSEN):
        _, group = _first_best(group_scores, groups, GROUPS_PADDED)
        group_scores = tl.where(groups[None, :] == group[:, None], float("-inf"), group_scores)
        is_kept = tl.where(group_of[None, :] == group[:, None], 1, is_kept)
    return tl.where(is_kept != 0, keys, float("-inf"))


@triton.jit(do_not_specialize=["num_tokens", "num_logits"])
def _moe_routing_kernel(
    logits,  # [num_tokens, num_logits] float32
    selection_bias,  # [NUM_EXPERTS] float32 where HAS_BIAS
    slot_mapping,  # [num_tokens] int64
    experts,  # [num_tokens, TOP_K] int32
    weights,  # [num_tokens, TOP_K] float32
    scale,
    num_tokens,
    num_logits,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    NORMALIZES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    NUM_CHOSEN: tl.constexpr,
    ADDS_SECOND: tl.constexpr,
    TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = tokens < num_tokens
    columns = tl.arange(0, EXPERTS_PADDED)
    is_expert = columns < NUM_EXPERTS
    # A last program that is not full repeats the last token, and stores it once.
    loaded = tl.minimum(tokens, num_tokens - 1)
    at = loaded.to(tl.int64)[:, None] * num_logits + columns[None, :]
    values = tl.load(logits + at, mask=is_expert[None, :], other=_NO_LOGIT)
    is_padding = tl.load(slot_mapping + loaded) < 0
    release_successor(PDL)
    if IS_SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(tl.where(is_expert[None, :], -values, 0.0)))
    else:
        exponentials = tl.exp(values - tl.max(values, 1)[:, None])
        scores = exponentials / tl.sum(exponentials, 1)[:, None]
    keys = scores
    if HAS_BIAS:
        keys += tl.load(selection_bias + columns, mask=is_expert, other=0.0)[None, :]
    # A comparison with NaN is false.
    keys = tl.where((keys == keys) & is_expert[None, :], keys, float("-inf"))
    if NUM_CHOSEN < NUM_GROUPS:
        keys = _keep_chosen_groups(
            keys,
            columns,
            TOKENS,
            EXPERTS_PADDED,
            NUM_GROUPS,
            GROUPS_PADDED,
            NUM_CHOSEN,
            NUM_EXPERTS // NUM_GROUPS,
            ADDS_SECOND,
        )
    ranks = tl.arange(0, TOP_K_PADDED)
    chosen = tl.zeros((TOKENS, TOP_K_PADDED), tl.int32)
    chosen_scores = tl.zeros((TOKENS, TOP_K_PADDED), tl.float32)
    for rank in tl.static_range(TOP_K):
        _, expert = _first_best(keys, columns, EXPERTS_PADDED)
        is_it = columns[None, :] == expert[:, None]
        score = tl.sum(tl.where(is_it, scores, 0.0), 1)
        keys = tl.where(is_it, float("-inf"), keys)
        chosen = tl.where((ranks == rank)[None, :], expert[:, None], chosen)
        chosen_scores = tl.where((ranks == rank)[None, :], score[:, None], chosen_scores)
    if NORMALIZES:
        chosen_scores = chosen_scores / (tl.sum(chosen_scores, 1)[:, None] + _LEAST_SUM)
    chosen_scores = tl.where(is_padding[:, None], 0.0, chosen_scores * scale)
    chosen = tl.where(is_padding[:, None], -1, chosen)
    places = tokens[:, None] * TOP_K + ranks[None, :]
    is_place = is_token[:, None] & (ranks < TOP_K)[None, :]
    tl.store(experts + places, chosen, mask=is_place)
    tl.store(weights + places, chosen_scores, mask=is_place)


def moe_routing(
    logits: Tensor,
    selection_bias: Tensor | None,
    slot_mapping: Tensor,
    *,
    rule: RoutingRule,
    experts: Tensor,
    weights: Tensor,
) -> None:
    """See `moe_routing_ref`. The kernel needs all tensors contiguous."""
    if not runs_triton(logits):
        moe_routing_ref(logits, selection_bias, slot_mapping, rule=rule, experts=experts, weights=weights)
        return
    num_tokens, num_logits = logits.shape
    assert num_logits >= rule.num_experts and logits.dtype == weights.dtype == torch.float32
    assert experts.shape == weights.shape == (num_tokens, rule.top_k) and experts.dtype == torch.int32
    assert all(tensor.is_contiguous() for tensor in (logits, slot_mapping, experts, weights))
    _moe_routing_kernel[(triton.cdiv(num_tokens, _TOKENS),)](
        logits,
        logits if selection_bias is None else selection_bias,
        slot_mapping,
        experts,
        weights,
        rule.scale,
        num_tokens,
        num_logits,
        NUM_EXPERTS=rule.num_experts,
        EXPERTS_PADDED=max(triton.next_power_of_2(rule.num_experts), 32),
        TOP_K=rule.top_k,
        TOP_K_PADDED=triton.next_power_of_2(rule.top_k),
        IS_SIGMOID=rule.scoring == "sigmoid",
        NORMALIZES=rule.normalizes,
        HAS_BIAS=selection_bias is not None,
        NUM_GROUPS=rule.num_groups,
        GROUPS_PADDED=triton.next_power_of_2(rule.num_groups),
        NUM_CHOSEN=rule.num_chosen_groups,
        ADDS_SECOND=rule.group_scoring == "two_best",
        TOKENS=_TOKENS,
        num_warps=_NUM_WARPS,
        **launch_options(logits.device),
    )
