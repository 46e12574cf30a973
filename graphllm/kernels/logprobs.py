"""Natural-log probabilities of a distribution over the vocabulary.

    logprob_i = x_i - max x - log sum_j exp(x_j - max x)

Owns the normalizer and the best alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphllm.kernels.top_tokens import top_tokens_ref


@dataclass(frozen=True, slots=True)
class Logprobs:
    """What has to be kept of a row of logits to report logprobs later.

    maxima, log_masses: [num_rows, 1] float32; logprob = logit - maxima - log_masses.
    top_ids: [num_rows, k] int64, most likely first, the lowest id first among equals;
    top_logprobs: [num_rows, k] float32.
    """

    maxima: Tensor
    log_masses: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    def of(self, token_logits: Tensor) -> Tensor:
        """The logprobs of tokens with these logits: [num_rows, n] float32, from the same.

        -inf for a logit of -inf, also in a row of nothing else.
        """
        return _normalize(token_logits, self.maxima, self.log_masses)


def logprobs_ref(logits: Tensor, num_top: int) -> Logprobs:
    """Normalizers and the `num_top` best tokens (fewer if the vocabulary has fewer) of each row.

    logits: [num_rows, vocab] float32 without NaN and +inf.
    """
    top_logits, top_ids = top_tokens_ref(logits, min(max(num_top, 1), logits.shape[1]))
    maxima = top_logits[:, :1].clamp(min=torch.finfo(torch.float32).min)  # finite in a row of -inf too
    log_masses = (logits - maxima).exp_().sum(1, keepdim=True).log_()
    top_logprobs = _normalize(top_logits[:, :num_top], maxima, log_masses)
    return Logprobs(maxima, log_masses, top_ids[:, :num_top], top_logprobs)


def _normalize(logits: Tensor, maxima: Tensor, log_masses: Tensor) -> Tensor:
    return torch.where(logits > float("-inf"), logits - maxima - log_masses, float("-inf"))
