"""One token drawn from softmax(logits), by the Gumbel-max trick.

    token = argmax_i (logits_i + g_i),    g_i from `random_draws.py`

Owns the search for the winner, not the noise. Ties go to the lowest id. The reference skips tiles that
cannot win. The kernel does so where a filter has left nothing of a chunk, and leaves a key for each
chunk of the vocabulary, of which `chosen_tokens.py` takes the largest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.adjusted_logits import AdjustedLogits, is_adjusted, load_adjusted
from graphllm.kernels.filter_thresholds import is_kept
from graphllm.kernels.random_draws import (
    DrawKeys,
    DrawPurpose,
    exponential_ref,
    tile_minima_ref,
    tile_noise,
)
from graphllm.kernels.row_maxima import RowMaxima, row_maximum, tempered
from graphllm.kernels.sampled_rows import (
    SEED,
    SIBLING,
    TEMPERATURE,
    SampledRows,
    line_of,
    load_float,
    load_int,
)
from graphllm.kernels.top_tokens import best_key, order_of, value_of_key
from graphllm.kernels.triton_support import launch_options, release_successor, wait_for_predecessor
from graphllm.kernels.vocab_tiles import CHUNK_SIZE, TILE_SIZE, num_chunks, split_into_tiles

# A tile is dropped when its bound is below the best value found by more than float32 rounding.
_ROUNDING_SLACK = 1e-3


def gumbel_draw_ref(logits: Tensor, keys: DrawKeys) -> Tensor:
    """One token for each row: [num_rows] int64.

    logits: [num_rows, vocab] float32, already divided by the temperature, no NaN and no +inf. -inf
    is never drawn, except that a row of nothing else gives token 0.

    A token's value is at most its tile's largest logit plus its tile's largest noise. The best of
    the tokens that carry their tile's largest noise is a value reached, and only tiles whose bound
    comes up to it are drawn in full: about one in twenty for a language model's logits.
    """
    tiles = split_into_tiles(logits)  # [num_rows, num_tiles, 64]
    tile_ids = torch.arange(tiles.shape[1], device=logits.device)[None]
    minima, owners = tile_minima_ref(keys, tile_ids)  # [num_rows, num_tiles] float32, int64
    noise_bounds = -minima.log()
    bounds = tiles.amax(2) + noise_bounds
    reached = (tiles.gather(2, owners[:, :, None])[:, :, 0] + noise_bounds).amax(1, keepdim=True)
    contends = (bounds >= reached - _ROUNDING_SLACK) & (bounds > float("-inf"))
    rows, contenders = contends.nonzero(as_tuple=True)  # [num_contenders] int64 each

    flat_tiles = rows * tiles.shape[1] + contenders
    values = tiles.reshape(-1, TILE_SIZE).index_select(0, flat_tiles) + _tile_noise(
        keys.select(rows), contenders, minima[rows, contenders], owners[rows, contenders]
    )
    best_lanes = values.argmax(1)
    best_values = torch.full_like(bounds, float("-inf"))
    best_values[rows, contenders] = values.gather(1, best_lanes[:, None])[:, 0]
    tokens = torch.zeros_like(owners)
    tokens[rows, contenders] = contenders * TILE_SIZE + best_lanes
    return tokens.gather(1, best_values.argmax(1, keepdim=True))[:, 0]


def _tile_noise(keys: DrawKeys, tile_ids: Tensor, minima: Tensor, owners: Tensor) -> Tensor:
    """The noise of all tokens of tiles: [n, 64] float32; all arguments have n rows."""
    groups = tile_ids[:, None] * (TILE_SIZE // 4) + torch.arange(TILE_SIZE // 4, device=tile_ids.device)
    words = torch.stack(keys.words(DrawPurpose.TOKEN, groups), dim=2).flatten(1)  # [n, 64] int64
    excess = exponential_ref(words).scatter_(1, owners[:, None], 0.0)
    return -(minima[:, None] + excess).log_()


@triton.jit
def _gumbel_draw_kernel(
    logits,
    changed,
    masks,
    lines,
    slots,
    floats,
    ints,
    lengths,
    best,
    thresholds,
    drawn,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    HAS_LINES: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    release_successor(PDL)
    chunk = tl.program_id(0)
    pair = tl.program_id(1)
    slot = tl.load(slots + pair)
    temperature = load_float(floats, slot, TEMPERATURE)
    key = tl.load(best + pair * NUM_CHUNKS + chunk)
    if temperature > 0:
        maximum = row_maximum(best, pair, NUM_CHUNKS, CHUNKS_PADDED)
        threshold = tl.load(thresholds + pair * 2)
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        value = tempered(value_of_key(key), maximum, temperature)
        # A chunk whose best token is not kept draws nothing, and so does a chunk of nothing but -inf.
        if (order_of(value) >= threshold) & (value > float("-inf")):
            values = load_adjusted(
                logits + line_of(lines, pair, HAS_LINES) * VOCAB,
                changed + pair.to(tl.int64) * VOCAB,
                masks + pair * ((VOCAB + 31) // 32),
                ids,
                is_adjusted(floats, ints, lengths, slot),
                VOCAB,
                HAS_MASKS,
            )
            values = tempered(values, maximum, temperature)
            noise = tile_noise(
                load_int(ints, slot, SEED),
                load_int(ints, slot, SIBLING),
                tl.load(lengths + slot),
                chunk * (CHUNK // TILE),
                CHUNK // TILE,
            )
            keeps = is_kept(values, ids, threshold, tl.load(thresholds + pair * 2 + 1))
            key = best_key(tl.where(keeps, values + noise, float("-inf")), ids)
        else:
            key = best_key(tl.full((CHUNK,), float("-inf"), tl.float32), ids)
    tl.store(drawn + pair * NUM_CHUNKS + chunk, key)


def gumbel_draw(
    adjusted: AdjustedLogits, rows: SampledRows, maxima: RowMaxima, *, thresholds: Tensor, out: Tensor
) -> Tensor:
    """The winner of each chunk as a token key, whose value is the token's logit and noise.

    thresholds: [num_pairs, 2] int32, of `filter_thresholds.py`. out: [num_pairs, num_chunks] int64; a
    greedy row gets its chunks' best, and a chunk without a winner a value of -inf. A kernel only.
    """
    vocab_size = adjusted.vocab_size
    chunks = num_chunks(vocab_size)
    _gumbel_draw_kernel[(chunks, rows.num_pairs)](
        adjusted.logits,
        adjusted.changed,
        adjusted.masks_or_any,
        rows.lines_or_any,
        rows.slots,
        rows.floats,
        rows.ints,
        rows.lengths,
        maxima.best,
        thresholds,
        out,
        VOCAB=vocab_size,
        CHUNK=CHUNK_SIZE,
        TILE=TILE_SIZE,
        NUM_CHUNKS=chunks,
        CHUNKS_PADDED=triton.next_power_of_2(chunks),
        HAS_LINES=rows.lines is not None,
        HAS_MASKS=adjusted.masks is not None,
        num_warps=4,
        enable_fp_fusion=False,
        **launch_options(adjusted.logits.device),
    )
    return out
