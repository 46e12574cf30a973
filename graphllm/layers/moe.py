"""The mixture of experts: a router, experts of which each token sees a few, and experts for all tokens.

Owns the stacks of the experts' weights and the order of the layer's operations. How a token's experts are
chosen is `kernels/moe_routing.py`'s, how weights are stored and multiplied the scheme's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from graphllm.arena import Arena
from graphllm.kernels.expert_activation import ExpertActivation
from graphllm.kernels.gated_activation import Activation
from graphllm.kernels.grouped_gemv import takes_gemv
from graphllm.kernels.moe_routing import RoutingRule, moe_routing
from graphllm.kernels.moe_sum import SharedPart
from graphllm.kernels.moe_tiles import (
    ExpertTiles,
    RoutedTokens,
    expert_tiles,
    max_expert_tiles,
    rows_per_tile_for,
)
from graphllm.kernels.triton_support import runs_triton
from graphllm.layers.linear import Linear
from graphllm.layers.loadable import LoadableModule, WeightSlot
from graphllm.layers.mlp import GatedMLP
from graphllm.quant.scheme import CheckpointTensor, ExpertScheme
from graphllm.quant.scheme_source import SchemeSource


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """The mathematics of one mixture of experts.

    routing: how many experts there are, and how a token's are chosen. router_bias: the router's logits have
    a bias. has_selection_bias: the choice has one, which the weights don't see. Each expert is a gated
    feed-forward layer of `expert_intermediate_size` with `expert_activation`; expert_bias is of all three of
    its projections. shared_intermediate_size: that of the feed-forward layer that all tokens pass as well, 0
    for none (several shared experts are one of as many times the size); shared_activation is its. With
    has_shared_gate its output is multiplied by the sigmoid of one more logit.
    """

    routing: RoutingRule
    expert_intermediate_size: int
    expert_activation: ExpertActivation
    expert_bias: bool = False
    router_bias: bool = False
    has_selection_bias: bool = False
    shared_intermediate_size: int = 0
    shared_activation: Activation = "silu"
    has_shared_gate: bool = False


class ExpertStack(LoadableModule):
    """One projection of all experts: the rows of expert 0, then those of expert 1, ...

    parts: name to out_features of each checkpoint layer that is merged into an expert's rows; the name "" is
    that of a layer which is not merged.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        *,
        parts: Mapping[str, int],
        bias: bool,
        scheme: ExpertScheme,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.in_features = in_features
        self.parts = dict(parts)
        self.rows_per_expert = sum(parts.values())
        self.has_bias = bias
        self.scheme = scheme
        scheme.create_weights(
            self,
            in_features=in_features,
            out_features=num_experts * self.rows_per_expert,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def weight_slots(self) -> dict[str, WeightSlot]:
        """A tensor for each expert and part: "3.gate.weight", or "3.weight" where nothing is merged."""
        slots, first_row = {}, 0
        for expert in range(self.num_experts):
            for part, out_features in self.parts.items():
                for name, wanted in self._tensors(out_features).items():
                    path = f"{expert}.{part}.{name}" if part else f"{expert}.{name}"
                    slots[path] = WeightSlot.of(wanted, partial(self._load, name, first_row), tensor=name)
                first_row += out_features
        return slots

    def whole_slots(self) -> dict[str, WeightSlot]:
        """One tensor for all experts, whose first dimension counts them."""
        slots = {}
        for name, wanted in self._tensors(self.rows_per_expert).items():
            slot = WeightSlot.of(wanted, partial(self._load_all, name), tensor=name)
            shape = None if slot.shape is None else (self.num_experts, *slot.shape)
            slots[name] = replace(slot, shape=shape)
        return slots

    def _tensors(self, out_features: int) -> dict[str, CheckpointTensor]:
        return self.scheme.checkpoint_tensors(self.in_features, out_features, bias=self.has_bias)

    def _load(self, name: str, first_row: int, tensor: torch.Tensor) -> None:
        self.scheme.load(self, name, tensor=tensor, first_row=first_row)

    def _load_all(self, name: str, tensor: torch.Tensor) -> None:
        shape = self._tensors(self.rows_per_expert)[name].shape
        for expert, rows in enumerate(tensor):
            # What a layout reordered without moving it is moved here, an expert at a time.
            rows = rows if shape is None else rows.reshape(shape)
            self.scheme.load(self, name, tensor=rows, first_row=expert * self.rows_per_expert)


class SelectionBias(LoadableModule):
    """What is added to the experts' scores before the choice: `bias` [num_experts], float32 in any model."""

    def __init__(self, num_experts: int, *, device: torch.device) -> None:
        super().__init__()
        values = torch.empty(num_experts, dtype=torch.float32, device=device)
        self.bias = nn.Parameter(values, requires_grad=False)

    def weight_slots(self) -> dict[str, WeightSlot]:
        return {"bias": WeightSlot(tuple(self.bias.shape), self._load)}

    def _load(self, tensor: torch.Tensor) -> None:
        self.bias.copy_(tensor)


class MoE(nn.Module):
    """A mixture of experts in the place of a feed-forward layer.

    The router's weights must be plain whatever the experts' scheme is: a rounded logit is another expert.
    Its last row is the shared experts' gate where there is one.
    """

    def __init__(
        self,
        hidden_size: int,
        config: MoEConfig,
        *,
        schemes: SchemeSource,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        num_experts, inner = config.routing.num_experts, config.expert_intermediate_size
        parts = {"experts": num_experts} | ({"shared_gate": 1} if config.has_shared_gate else {})
        self.router = Linear(
            hidden_size, parts, bias=config.router_bias, scheme=schemes.plain, device=device, dtype=dtype
        )
        self.selection = SelectionBias(num_experts, device=device) if config.has_selection_bias else None
        stack = partial(ExpertStack, num_experts, bias=config.expert_bias, device=device, dtype=dtype)
        gate_up_parts = {"gate": inner, "up": inner}
        self.gate_up = stack(hidden_size, parts=gate_up_parts, scheme=schemes.at("gate_up"))
        self.down = stack(inner, parts={"": hidden_size}, scheme=schemes.at("down"))
        self.shared = None
        if config.shared_intermediate_size:
            self.shared = GatedMLP(
                hidden_size,
                config.shared_intermediate_size,
                activation=config.shared_activation,
                bias=False,
                schemes=schemes.within("shared"),
                device=device,
                dtype=dtype,
            )

    def forward(self, x: torch.Tensor, *, slot_mapping: torch.Tensor, arena: Arena) -> torch.Tensor:
        """x: [num_tokens, hidden_size]; returns the same shape, without the residual.

        slot_mapping: [num_tokens] int64, negative for padding tokens, which no expert sees.
        """
        config, num_tokens = self.config, len(x)
        routing = config.routing
        logits = arena.take("router_logits", num_tokens, self.router.out_features, dtype=torch.float32)
        self.router.project(x, out=logits)
        experts = arena.take("experts", num_tokens, routing.top_k, dtype=torch.int32)
        weights = arena.take("expert_weights", num_tokens, routing.top_k, dtype=torch.float32)
        bias = None if self.selection is None else self.selection.bias
        moe_routing(logits, bias, slot_mapping, rule=routing, experts=experts, weights=weights)
        shared = None
        if self.shared is not None:
            output = self.shared(x, arena=arena)
            shared = SharedPart(output, logits if config.has_shared_gate else None)
        routed = RoutedTokens(experts, weights, self._tiles(experts, arena=arena))
        num_pairs = experts.numel()
        activated = arena.take("inner", num_pairs, config.expert_intermediate_size, dtype=x.dtype)
        scheme = self.gate_up.scheme
        scheme.apply_experts_gated(self.gate_up, x, routed, config.expert_activation, out=activated)
        results = None
        if routed.tiles is not None:
            results = arena.take("wide", num_pairs, self.hidden_size, dtype=x.dtype)
        out = arena.take("delta", num_tokens, self.hidden_size, dtype=x.dtype)
        self.down.scheme.apply_experts(self.down, activated, routed, shared, results=results, out=out)
        return out

    def _tiles(self, experts: torch.Tensor, *, arena: Arena) -> ExpertTiles | None:
        """The tiles of the step's tokens, None where none are needed."""
        num_tokens, top_k = experts.shape
        num_experts = self.config.routing.num_experts
        if not runs_triton(experts) or takes_gemv(num_tokens, top_k=top_k, num_experts=num_experts):
            return None
        num_pairs = math.prod(experts.shape)
        rows = rows_per_tile_for(num_pairs, num_experts)
        num_tiles = max_expert_tiles(num_pairs, num_experts, rows)
        out = ExpertTiles(
            arena.take("tile_experts", num_tiles, dtype=torch.int32),
            arena.take("tile_pairs", num_tiles, rows, dtype=torch.int32),
        )
        return expert_tiles(experts, num_experts=num_experts, out=out)
