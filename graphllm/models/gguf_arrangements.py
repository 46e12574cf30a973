"""How GGUF tensors become Hugging Face's where the numbers are stored otherwise.

Owns the reordering, and the one change of value (norms that GGUF stores as 1 + weight). Which tensors need
it is declared in `gguf_families.py`. Every arrangement takes the stored tensors, row-major, and the model's
heads, and works on torch's meta device too, which is how shapes are found; a RuntimeError means that the
shapes do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Heads:
    """How attention's rows are shared out; head_dim is a key's."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


Arrangement = Callable[[Sequence[torch.Tensor], Heads], torch.Tensor]


def query_halves(parts: Sequence[torch.Tensor], heads: Heads) -> torch.Tensor:
    """[num_heads * head_dim, ...] with neighbours that turn together to halves that do."""
    return _undo_interleaving(parts[0], heads.num_heads)


def key_halves(parts: Sequence[torch.Tensor], heads: Heads) -> torch.Tensor:
    """The same for keys."""
    return _undo_interleaving(parts[0], heads.num_kv_heads)


def _undo_interleaving(values: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Give rows [pairs interleaved: 0, n, 1, n+1, ...] of each head the order [0, 1, ..., n, n+1, ...].

    Converters to GGUF interleave the two halves of each head of q and k, because ggml's rotary
    embedding for Llama turns neighbouring elements where Hugging Face's turns the two halves.
    """
    pairs = values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def minus_one(parts: Sequence[torch.Tensor], heads: Heads) -> torch.Tensor:
    """Factors of norms that multiply by 1 + weight, of which GGUF stores the sum."""
    return parts[0] - 1.0


def transposed(parts: Sequence[torch.Tensor], heads: Heads) -> torch.Tensor:
    """[..., out_features, in_features] to [..., in_features, out_features]."""
    return parts[0].mT


def one_row(parts: Sequence[torch.Tensor], heads: Heads) -> torch.Tensor:
    """A vector as a matrix of one row."""
    return parts[0].reshape(1, -1)


def query_rows(parts: Sequence[torch.Tensor], heads: Heads) -> torch.Tensor:
    """The queries' rows of a merged projection."""
    return _split_rows(parts[0], heads)[0]


def key_rows(parts: Sequence[torch.Tensor], heads: Heads) -> torch.Tensor:
    """The keys' rows of a merged projection."""
    return _split_rows(parts[0], heads)[1]


def value_rows(parts: Sequence[torch.Tensor], heads: Heads) -> torch.Tensor:
    """The values' rows of a merged projection."""
    return _split_rows(parts[0], heads)[2]


def grouped_by_key(parts: Sequence[torch.Tensor], heads: Heads) -> torch.Tensor:
    """A merged projection group by group: a key head's queries, its key, its value, then the next's."""
    rest = parts[0].shape[1:]
    query, key, value = _split_rows(parts[0], heads)
    num_groups, dim = heads.num_kv_heads, heads.head_dim
    groups = (
        query.reshape(num_groups, heads.num_heads // num_groups, dim, *rest),
        key.reshape(num_groups, 1, dim, *rest),
        value.reshape(num_groups, 1, dim, *rest),
    )
    return torch.cat(groups, dim=1).reshape(parts[0].shape)


def _split_rows(values: torch.Tensor, heads: Heads) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values; a number of rows that does not fit shows in the shapes of the parts."""
    key_size = heads.num_kv_heads * heads.head_dim
    return torch.tensor_split(values, (values.shape[0] - 2 * key_size, values.shape[0] - key_size))


def stacked_rows(parts: Sequence[torch.Tensor], heads: Heads) -> torch.Tensor:
    """Each expert's gate rows, then its factor rows: twice [experts, rows, in] to [experts, 2 rows, in]."""
    return torch.cat(tuple(parts), dim=1)


def paired_rows(parts: Sequence[torch.Tensor], heads: Heads) -> torch.Tensor:
    """Gate 0, factor 0, gate 1, ... of each expert, matrices with their inputs first.

    Twice [experts, rows, in] to [experts, in, 2 rows]; biases, twice [experts, rows] to [experts, 2 rows].
    """
    gate, _ = parts
    pairs = torch.stack(tuple(parts), dim=2)  # [experts, rows, 2, ...]
    rows = pairs.reshape(gate.shape[0], 2 * gate.shape[1], *gate.shape[2:])
    return rows.mT if rows.ndim == 3 else rows


def key_value_heads(parts: Sequence[torch.Tensor], heads: Heads) -> torch.Tensor:
    """The projection out of the latent: each head's key rows, then its value rows.

    GGUF has keys as [heads, rank, key_dim] and values as [heads, value_dim, rank]; returns
    [heads * (key_dim + value_dim), rank].
    """
    keys, values = parts
    return torch.cat((keys.mT, values), dim=1).flatten(0, 1)
