"""A bias for chosen tokens.

    x_t <- x_t + b_t    for the tokens t that a request names

Owns nothing but this; a row names each token at most once. The device does it for one row inside
`adjusted_logits.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def apply_logit_bias_ref(
    logits: Tensor, bias_ids: Tensor, bias_values: Tensor, *, num_biases: Tensor
) -> None:
    """Add biases to `logits` ([num_rows, vocab] float32, contiguous) in place.

    bias_ids: [num_rows, max_biases] int32 in [0, vocab), bias_values: the same shape in float32.
    Row i has `num_biases[i]` of them ([num_rows] int64); what lies beyond is never used.
    """
    columns = torch.arange(bias_ids.shape[1], device=logits.device)
    rows, used = (columns < num_biases[:, None]).nonzero(as_tuple=True)  # [total biases] int64 each
    flat_index = rows * logits.shape[1] + bias_ids[rows, used]
    logits.view(-1).index_add_(0, flat_index, bias_values[rows, used])


@triton.jit
def add_biases(logits_row, bias_ids_row, bias_values_row, num_biases, BLOCK: tl.constexpr):
    """The reference for one row in place, by one program. BLOCK: at least the table's width."""
    columns = tl.arange(0, BLOCK)
    used = columns < num_biases
    ids = tl.load(bias_ids_row + columns, mask=used, other=0)
    biases = tl.load(bias_values_row + columns, mask=used, other=0.0)
    logits = tl.load(logits_row + ids, mask=used, other=0.0, cache_modifier=".cg")
    tl.store(logits_row + ids, logits + biases, mask=used)
