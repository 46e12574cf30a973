"""Natural-log probabilities of a distribution over the vocabulary.

    logprob_i = x_i - max x - log sum_j exp(x_j - max x)

Owns the normalizer and the best alternatives. On the device a first kernel takes both of each chunk of
the vocabulary, and a second one puts the chunks together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.sampled_rows import SampledRows, line_of
from graphllm.kernels.top_tokens import id_of_key, token_key, top_tokens_ref, value_of_key
from graphllm.kernels.triton_support import launch_options, release_successor, wait_for_predecessor
from graphllm.kernels.vocab_tiles import CHUNK_SIZE, num_chunks, without_nan

_NO_TOKEN: tl.constexpr = tl.constexpr(-(2**63))
_SMALLEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).min)


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


@triton.jit
def _exp_below(values, maximum):
    """exp(values - maximum), 0 for -inf, also where the maximum itself is -inf."""
    shifted = values - tl.maximum(maximum, _SMALLEST)
    return tl.exp(tl.where(values > float("-inf"), shifted, float("-inf")))


@triton.jit
def _logprob(values, maximum, log_mass):
    return tl.where(values > float("-inf"), values - maximum - log_mass, float("-inf"))


@triton.jit
def _chunk_logprobs_kernel(
    logits,
    lines,
    top_keys,
    masses,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    NUM_TOP: tl.constexpr,
    HAS_LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    release_successor(PDL)
    chunk = tl.program_id(0)
    pair = tl.program_id(1)
    row = logits + line_of(lines, pair, HAS_LINES) * VOCAB
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    values = without_nan(tl.load(row + ids, mask=ids < VOCAB, other=float("-inf")))
    at = pair * NUM_CHUNKS + chunk
    tl.store(masses + at, tl.sum(_exp_below(values, tl.max(values, 0)), 0))
    keys = tl.where(ids < VOCAB, token_key(values, ids), _NO_TOKEN)
    for rank in range(NUM_TOP):
        best = tl.max(keys, 0)
        tl.store(top_keys + at * NUM_TOP + rank, best)
        keys = tl.where(keys == best, _NO_TOKEN, keys)


@triton.jit
def _logprobs_kernel(
    logits,
    lines,
    top_keys,
    masses,
    token_ids,
    logprobs,
    top_ids,
    top_logprobs,
    VOCAB: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    NUM_TOP: tl.constexpr,
    KEYS_PADDED: tl.constexpr,
    HAS_LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    release_successor(PDL)
    pair = tl.program_id(0)
    line = line_of(lines, pair, HAS_LINES)
    lanes = tl.arange(0, KEYS_PADDED)
    in_row = lanes < NUM_CHUNKS * NUM_TOP
    keys = tl.load(top_keys + pair * NUM_CHUNKS * NUM_TOP + lanes, mask=in_row, other=_NO_TOKEN)
    maximum = tl.maximum(value_of_key(tl.max(keys, 0)), _SMALLEST)
    chunks = tl.arange(0, CHUNKS_PADDED)
    at = pair * NUM_CHUNKS + chunks
    in_row = chunks < NUM_CHUNKS
    chunk_maxima = value_of_key(tl.load(top_keys + at * NUM_TOP, mask=in_row, other=_NO_TOKEN))
    chunk_maxima = tl.where(in_row, chunk_maxima, float("-inf"))
    chunk_masses = tl.load(masses + at, mask=in_row, other=0.0)
    mass = tl.sum(chunk_masses * _exp_below(chunk_maxima, maximum), 0)
    log_mass = tl.log(tl.where(mass > 0, mass, 1.0))
    token = tl.load(token_ids + line)
    value = without_nan(tl.load(logits + line * VOCAB + token))
    tl.store(logprobs + line, _logprob(value, maximum, log_mass))
    for rank in range(NUM_TOP):
        best = tl.max(keys, 0)
        keys = tl.where(keys == best, _NO_TOKEN, keys)
        # A vocabulary of fewer tokens: what is left is not a token.
        exists = rank < VOCAB
        value = tl.where(exists, value_of_key(tl.where(exists, best, 0)), float("-inf"))
        tl.store(top_ids + line * NUM_TOP + rank, tl.where(exists, id_of_key(best), 0))
        tl.store(top_logprobs + line * NUM_TOP + rank, _logprob(value, maximum, log_mass))


def write_logprobs(
    logits: Tensor,
    rows: SampledRows,
    *,
    chunk_top_keys: Tensor,
    chunk_masses: Tensor,
    token_ids: Tensor,
    out: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs of the tokens in `token_ids`, and the best alternatives, at each pair's line of `out`.

    logits: [num_lines, vocab] float32. token_ids: [num_lines] int64. out: logprobs [num_lines] float32,
    top_ids [num_lines, num_top] int64 and top_logprobs, the same in float32; 0 and -inf beyond the end of
    a vocabulary with fewer tokens. chunk_top_keys [num_pairs, num_chunks, num_top] int64 and chunk_masses
    [num_pairs, num_chunks] float32 are scratch. A kernel only.
    """
    logprobs, top_ids, top_logprobs = out
    vocab_size, num_top = logits.shape[1], top_ids.shape[1]
    chunks = num_chunks(vocab_size)
    options = launch_options(logits.device)
    has_lines = rows.lines is not None
    _chunk_logprobs_kernel[(chunks, rows.num_pairs)](
        logits,
        rows.lines_or_any,
        chunk_top_keys,
        chunk_masses,
        VOCAB=vocab_size,
        CHUNK=CHUNK_SIZE,
        NUM_CHUNKS=chunks,
        NUM_TOP=num_top,
        HAS_LINES=has_lines,
        num_warps=4,
        **options,
    )
    _logprobs_kernel[(rows.num_pairs,)](
        logits,
        rows.lines_or_any,
        chunk_top_keys,
        chunk_masses,
        token_ids,
        logprobs,
        top_ids,
        top_logprobs,
        VOCAB=vocab_size,
        NUM_CHUNKS=chunks,
        CHUNKS_PADDED=triton.next_power_of_2(chunks),
        NUM_TOP=num_top,
        KEYS_PADDED=triton.next_power_of_2(chunks * num_top),
        HAS_LINES=has_lines,
        num_warps=4,
        **options,
    )
    return out
