"""LoRA adapters beside linear layers (Hu et al., 2021, arXiv:2106.09685).

Owns where an adapter's matrices lie in memory, the places on the device that hold one adapter each, and what
a linear layer adds for the tokens that have one. Which adapter lies in which place is the scheduler's
decision; reading adapters is `models/lora.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from graphllm.arena import Arena
from graphllm.kernels.lora_expand import feature_tiles, lora_expand
from graphllm.kernels.lora_shrink import lora_shrink
from graphllm.layers.linear import Linear

_ALIGNMENT = 256  # bytes: of every matrix, so that all of them are read in the widest loads


@dataclass(frozen=True, slots=True)
class AdapterViews:
    """One layer's share of adapters' memory.

    down: [num_adapters, num_parts, max_rank, in_features]; up: [num_adapters, out_features, max_rank]; both
    of the activations' dtype. scales: [num_adapters, num_parts] float32, 0 for a part that the adapter does
    not change, whose matrices then mean nothing.
    """

    down: torch.Tensor
    up: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """Where a layer's share begins in an adapter's memory, in bytes, and its sizes; parts as in `Linear`."""

    in_features: int
    out_features: int
    parts: Mapping[str, int]
    down: int
    up: int
    scales: int


class AdapterLayout:
    """An adapter's memory: one piece of `num_bytes` bytes with a share for every layer that can have one.

    linears: those layers by their path. An adapter of smaller rank than max_rank ends in zeros.
    """

    def __init__(self, linears: Mapping[str, Linear], *, max_rank: int, dtype: torch.dtype) -> None:
        self.max_rank = max_rank
        self.dtype = dtype
        self.places: dict[str, LayerPlace] = {}
        self.num_bytes = 0
        for path, linear in linears.items():
            num_parts = len(linear.parts)
            self.places[path] = LayerPlace(
                linear.in_features,
                linear.out_features,
                linear.parts,
                self._take(num_parts * max_rank * linear.in_features * dtype.itemsize),
                self._take(linear.out_features * max_rank * dtype.itemsize),
                self._take(num_parts * torch.float32.itemsize),
            )

    def _take(self, num_bytes: int) -> int:
        start = self.num_bytes
        self.num_bytes += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return start

    def views(self, memory: torch.Tensor, path: str) -> AdapterViews:
        """A layer's share of memory: [num_adapters, num_bytes] uint8, on any device."""
        place, rank = self.places[path], self.max_rank
        num_parts = len(place.parts)

        def view(start: int, dtype: torch.dtype, *size: int) -> torch.Tensor:
            num_bytes = torch.Size(size).numel() * dtype.itemsize
            return memory[:, start : start + num_bytes].view(dtype).view(len(memory), *size)

        return AdapterViews(
            view(place.down, self.dtype, num_parts, rank, place.in_features),
            view(place.up, self.dtype, place.out_features, rank),
            view(place.scales, torch.float32, num_parts),
        )


class TokenAdapters:
    """Which adapter each of a step's tokens has, as the layers' hooks see it.

    of_tokens: [max_num_tokens] int32, the place of each token's adapter on the device or -1. in_play says
    whether the step that is being launched has any; it is set before each piece of the step's layers, because
    a capture's pieces come between other steps.
    """

    __slots__ = ("arena", "in_play", "of_tokens")

    def __init__(self, of_tokens: torch.Tensor, arena: Arena) -> None:
        self.of_tokens = of_tokens
        self.arena = arena
        self.in_play = False


class LinearAdapters:
    """What one linear layer adds to its product for tokens with an adapter."""

    __slots__ = ("_tiles", "_tokens", "_views")

    def __init__(self, views: AdapterViews, tokens: TokenAdapters, *, parts: Mapping[str, int]) -> None:
        self._views = views
        self._tokens = tokens
        self._tiles = feature_tiles(parts.values(), device=views.down.device)

    @property
    def in_play(self) -> bool:
        """Whether the step at hand has tokens with an adapter."""
        return self._tokens.in_play

    def add(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """x: [num_tokens, in_features], all of the step's tokens; out: [num_tokens, out_features]."""
        tokens, views = self._tokens, self._views
        if not tokens.in_play:
            return
        of_tokens = tokens.of_tokens[: len(x)]
        _, num_parts, max_rank, _ = views.down.shape
        shrunk = tokens.arena.take("lora", len(x), num_parts, max_rank, dtype=torch.float32)
        lora_shrink(x, views.down, views.scales, of_tokens, out=shrunk)
        lora_expand(shrunk, views.up, views.scales, of_tokens, self._tiles, out=out)


class AdapterMemory:
    """The device's places for adapters, and the hooks of all layers that can have one.

    memory: [max_loras, layout.num_bytes] uint8, a row an adapter. It is born zero: no layer is changed.
    """

    def __init__(
        self,
        linears: Mapping[str, Linear],
        *,
        max_loras: int,
        max_rank: int,
        dtype: torch.dtype,
        tokens: TokenAdapters,
    ) -> None:
        self.layout = AdapterLayout(linears, max_rank=max_rank, dtype=dtype)
        device = tokens.of_tokens.device
        self.memory = torch.zeros(max_loras, self.layout.num_bytes, dtype=torch.uint8, device=device)
        self.tokens = tokens
        for path, linear in linears.items():
            views = self.layout.views(self.memory, path)
            linear.adapters = LinearAdapters(views, self.tokens, parts=linear.parts)

    def upload(self, image: torch.Tensor, place: int) -> None:
        """Copy an adapter's image ([num_bytes] uint8, on the host) to a place; runs on the device."""
        self.memory[place].copy_(image, non_blocking=True)
