"""The choice of the next token, once a row's logits are as the request wants them.

    temperature 0:  token = argmax x
    otherwise:      token ~ softmax(x / temperature), restricted to what the filters keep

Owns the order of temperature, filters and draw. The whole order of a request's parameters is:
repetition, frequency and presence penalties (`penalties.py`), logit_bias (`logit_bias.py`),
min_tokens (`min_tokens.py`), the grammar (`grammar_bitmask.py`), and then what stands here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphllm.kernels.argmax import argmax_ref
from graphllm.kernels.gumbel_draw import gumbel_draw_ref
from graphllm.kernels.random_draws import DrawKeys
from graphllm.kernels.token_filters import TokenFilters, filter_tokens_ref


def sample_tokens_ref(
    logits: Tensor, temperatures: Tensor, *, keys: DrawKeys, filters: TokenFilters | None
) -> Tensor:
    """One token for each row: [num_rows] int64. `logits` is used up: its values are lost.

    logits: [num_rows, vocab] float32, contiguous, without NaN and +inf; a row of nothing but -inf
    gives token 0. temperatures: [num_rows] float32, 0 (greedy) or a normal number; however small,
    nothing overflows, because a row's largest logit is subtracted first. filters: None if no row
    has any.
    """
    tokens = argmax_ref(logits)
    random = (temperatures > 0).nonzero()[:, 0]  # [n] int64
    if random.numel() == 0:
        return tokens
    maxima = logits.gather(1, tokens[:, None])
    maxima.clamp_(min=torch.finfo(torch.float32).min)  # a row of -inf stays one
    if random.numel() < logits.shape[0]:
        logits = logits.index_select(0, random)
    logits.sub_(maxima[random]).div_(temperatures[random, None])
    if filters is not None:
        filter_tokens_ref(logits, filters.select(random))
    tokens[random] = gumbel_draw_ref(logits, keys.select(random))
    return tokens
