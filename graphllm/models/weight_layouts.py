"""Tensors that a checkpoint stores otherwise than the decoder: the same numbers in another order.

Owns the reordering; which tensors need it is the families' declaration.
"""

from __future__ import annotations

import torch

from graphllm.layers.loadable import WeightSlot
from graphllm.models.config import ModelConfig


def transposed(slot: WeightSlot, config: ModelConfig) -> WeightSlot:
    """Matrices as [in_features, out_features]; vectors as they are."""

    def load(tensor: torch.Tensor) -> None:
        slot.load(tensor.mT if tensor.ndim == 2 else tensor)

    return WeightSlot(slot.shape[::-1], load)


def stacked_pairs(slot: WeightSlot, config: ModelConfig) -> WeightSlot:
    """All experts' gates and factors in turn, matrices as [num_experts, in_features, 2 * intermediate].

    Rows gate 0, factor 0, gate 1, ... instead of all gates, then all factors. Nothing is moved here: the
    slot gets a view, [num_experts, 2, intermediate, ...], and moves an expert at a time.
    """

    def load(tensor: torch.Tensor) -> None:
        rows = tensor.mT if tensor.ndim == 3 else tensor  # [num_experts, 2 * intermediate, ...]
        num_experts, num_rows, *rest = rows.shape
        slot.load(rows.view(num_experts, num_rows // 2, 2, *rest).transpose(1, 2))

    return WeightSlot(_stacked_shape(slot), load)


def stacked_transposed(slot: WeightSlot, config: ModelConfig) -> WeightSlot:
    """All experts' matrices as [num_experts, in_features, out_features]; vectors as they are."""

    def load(tensor: torch.Tensor) -> None:
        slot.load(tensor.mT if tensor.ndim == 3 else tensor)

    return WeightSlot(_stacked_shape(slot), load)


def _stacked_shape(slot: WeightSlot) -> tuple[int, ...]:
    num_experts, *rest = slot.shape
    return num_experts, *reversed(rest)


def grouped_qkv(slot: WeightSlot, config: ModelConfig) -> WeightSlot:
    """The merged projection group by group: a KV head's queries, its key, its value, then the next's.

    Rows of [num_kv_heads, num_heads / num_kv_heads + 2, head_dim] instead of all queries, all keys, all
    values.
    """
    num_queries = config.num_heads // config.num_kv_heads

    def load(tensor: torch.Tensor) -> None:
        shape = (config.num_kv_heads, num_queries + 2, config.head_dim, *tensor.shape[1:])
        groups = tensor.reshape(shape)
        parts = (groups[:, :num_queries], groups[:, num_queries], groups[:, num_queries + 1])
        slot.load(torch.cat([part.reshape(-1, *tensor.shape[1:]) for part in parts]))

    return WeightSlot(slot.shape, load)
