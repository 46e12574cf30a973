"""top_k, top_p and min_p: which tokens may be drawn.

In the total order of `top_tokens.py` (larger logit first, lower id among equals), with rank r from
0, p = softmax(logits), q = p renormalised over the first top_k tokens, a token is kept if

    r < top_k                              top_k; 0 keeps all
    sum of q before it < top_p             top_p: the smallest set whose mass reaches it, the token
                                           that crosses included (Holtzman et al., "The Curious Case
                                           of Neural Text Degeneration", 2019)
    p >= min_p * max p                     min_p (Nguyen et al., "Turning Up the Heat", 2024)

The first token is always kept. Each condition keeps a prefix of the order, so the shortest prefix
decides, and what lies beyond it need not be ordered. Owns the conditions and how far to look; the
kernel is in `filter_thresholds.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphllm.kernels.top_tokens import sort_tokens_ref, top_tokens_ref

# Most rows keep fewer tokens than this; only the others are looked at again.
_FIRST_WIDTH = 128


@dataclass(frozen=True, slots=True)
class TokenFilters:
    """Each row's filters: top_k [num_rows] int64 (0: off), top_p and min_p [num_rows] float32
    (1 and 0: off)."""

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    def select(self, rows: Tensor) -> TokenFilters:
        """The filters of `rows` ([n] int64)."""
        return TokenFilters(self.top_k[rows], self.top_p[rows], self.min_p[rows])

    def is_active(self, vocab_size: int) -> Tensor:
        """Which rows filter anything: [num_rows] bool."""
        return ((self.top_k > 0) & (self.top_k < vocab_size)) | (self.top_p < 1.0) | (self.min_p > 0.0)


def filter_tokens_ref(logits: Tensor, filters: TokenFilters) -> None:
    """Set the logits of tokens that are not kept to -inf, in place.

    logits: [num_rows, vocab] float32, contiguous, after temperature, no NaN and no +inf.
    """
    num_rows, vocab_size = logits.shape
    rows = filters.is_active(vocab_size).nonzero()[:, 0]  # [n] int64
    if rows.numel() == num_rows:
        _filter_all(logits, filters)
    elif rows.numel():
        filtered = logits.index_select(0, rows)
        _filter_all(filtered, filters.select(rows))
        logits.index_copy_(0, rows, filtered)


def _filter_all(logits: Tensor, filters: TokenFilters) -> None:
    vocab_size = logits.shape[1]
    top_k = torch.where(filters.top_k > 0, filters.top_k, vocab_size).clamp_(max=vocab_size)
    filters = TokenFilters(top_k, filters.top_p, filters.min_p)
    masses = _full_masses(logits, filters)
    values, ids = top_tokens_ref(logits, min(_FIRST_WIDTH, vocab_size))
    keeps, is_closed = _kept_prefix(values, filters, masses, vocab_size=vocab_size)
    found = [(ids, values.masked_fill(~keeps, float("-inf")))]
    open_rows = (~is_closed).nonzero()  # [num_open, 1] int64
    # One by one: the lengths differ too much to share a tensor.
    found += [_filter_row(logits.index_select(0, row), filters.select(row), masses[row]) for row in open_rows]
    logits.fill_(float("-inf")).scatter_(1, *found[0])
    for row, (ids, values) in zip(open_rows, found[1:], strict=True):
        logits[row, ids] = values


def _filter_row(logits: Tensor, filters: TokenFilters, masses: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and logits, [num_kept] each, of all that is kept of one row ([1, vocab])."""
    ids = (logits[0] >= _lowest_kept(logits, filters, masses)).nonzero()[:, 0]
    values, ids = sort_tokens_ref(logits[:, ids], ids[None])
    keeps, _ = _kept_prefix(values, filters, masses, vocab_size=logits.shape[1])
    return ids[keeps], values[keeps]


def _full_masses(logits: Tensor, filters: TokenFilters) -> Tensor:
    """sum exp(x - max x), which top_p is a share of: [num_rows] float32.

    0 where it is not needed: without top_p, and where the first top_k tokens are what counts.
    """
    num_rows, vocab_size = logits.shape
    masses = torch.zeros(num_rows, device=logits.device)
    rows = ((filters.top_p < 1.0) & (filters.top_k == vocab_size)).nonzero()[:, 0]
    if rows.numel():
        logits = logits.index_select(0, rows)
        masses[rows] = logits.sub_(logits.amax(1, keepdim=True)).exp_().sum(1)
    return masses


def _lowest_kept(logits: Tensor, filters: TokenFilters, masses: Tensor) -> Tensor:
    """A bound for one row ([1, vocab]): tokens with a smaller logit are not kept. [] float32.

    For top_p: a token and all that follow it have at most vocab times its mass together, so where
    that is below (1 - top_p) of the whole, the mass before it has reached top_p.
    """
    vocab_size = logits.shape[1]
    top_k = int(filters.top_k)
    maximum = logits.amax()
    cut = maximum + filters.min_p[0].log()
    if top_k < vocab_size:
        kth = logits[0].topk(top_k).values[-1]
        # top_p is a share of all top_k tokens: they must be there, whatever min_p makes of them.
        return kth if filters.top_p < 1.0 else torch.maximum(cut, kth)
    if filters.top_p < 1.0:
        rounding = 0.99
        share = rounding * (1.0 - filters.top_p[0]) / vocab_size
        cut = torch.maximum(cut, maximum + (share * masses[0]).log())
    return cut


def _kept_prefix(
    values: Tensor, filters: TokenFilters, full_masses: Tensor, *, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """Which of a row's first `width` tokens are kept, and whether no other token can be.

    values: [num_rows, width] in order. Returns [num_rows, width] bool and [num_rows] bool.
    """
    width = values.shape[1]
    top_k = filters.top_k[:, None]
    top_p = filters.top_p[:, None]
    in_top_k = torch.arange(width, device=values.device) < top_k
    masses = (values - values[:, :1]).exp_() * in_top_k
    totals = torch.where(top_k == vocab_size, full_masses[:, None], masses.sum(1, keepdim=True))
    keeps = in_top_k & (values >= values[:, :1] + filters.min_p[:, None].log()) & (values > float("-inf"))
    keeps[:, 1:] &= (masses.cumsum(1)[:, :-1] < top_p * totals) | (top_p >= 1.0)
    keeps[:, 0] = True
    is_total_known = (filters.top_k <= width) | (filters.top_k == vocab_size) | (filters.top_p >= 1.0)
    return keeps, (~keeps[:, -1] & is_total_known) | (width == vocab_size)
