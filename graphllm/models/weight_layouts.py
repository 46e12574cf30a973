"""Tensors that a checkpoint stores otherwise than the decoder: the same numbers in another order.

Owns the reordering; which tensors need it is the families' declaration.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from graphllm.layers.loadable import WeightSlot
from graphllm.models.config import ModelConfig
from graphllm.quant.scheme import PLAIN_DTYPES


def transposed(slot: WeightSlot, config: ModelConfig) -> WeightSlot:
    """Matrices as [in_features, out_features]; vectors as they are."""

    def load(tensor: torch.Tensor) -> None:
        slot.load(tensor.mT if tensor.ndim == 2 else tensor)

    assert slot.shape is not None
    return WeightSlot(slot.shape[::-1], load)


def stacked_pairs(slot: WeightSlot, config: ModelConfig) -> WeightSlot:
    """All experts' gates and factors in turn, matrices as [num_experts, in_features, 2 * intermediate].

    Rows gate 0, factor 0, gate 1, ... instead of all gates, then all factors. Nothing is moved here: the
    slot gets a view, [num_experts, 2, intermediate, ...], and moves an expert at a time.
    """

    is_packed = _is_packed(slot)

    def load(tensor: torch.Tensor) -> None:
        # [num_experts, 2 * intermediate, ...]
        rows = tensor.mT if tensor.ndim == 3 and not is_packed else tensor
        num_experts, num_rows, *rest = rows.shape
        slot.load(rows.view(num_experts, num_rows // 2, 2, *rest).transpose(1, 2))

    return replace(slot, shape=_stacked_shape(slot), load=load)


def stacked_transposed(slot: WeightSlot, config: ModelConfig) -> WeightSlot:
    """All experts' matrices as [num_experts, in_features, out_features]; vectors as they are."""
    if _is_packed(slot):
        return slot

    def load(tensor: torch.Tensor) -> None:
        slot.load(tensor.mT if tensor.ndim == 3 else tensor)

    return WeightSlot(_stacked_shape(slot), load)


def _is_packed(slot: WeightSlot) -> bool:
    """Whether its tensor is a part of packed numbers, which are row by row in any checkpoint."""
    return slot.dtypes.isdisjoint(PLAIN_DTYPES)


def _stacked_shape(slot: WeightSlot) -> tuple[int, ...]:
    assert slot.shape is not None
    if _is_packed(slot):
        return slot.shape
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
