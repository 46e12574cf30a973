"""Where top_k, top_p and min_p cut a row, found without sorting the vocabulary.

What is kept is a prefix of the total order (`token_filters.py`, whose reference is this file's too), so
two numbers describe it:

    token i is kept  iff  order(v_i) > threshold,  or  order(v_i) = threshold and i <= last_id

with v the tempered logits and `order` their integers that compare as they do. Owns the search:

1. Tile maxima give a bound below which nothing is kept: the k-th largest of them for top_k; for top_p
   the one at which the maxima alone have the mass wanted. Only tiles that reach the bound are read.
   For most rows these are a few dozen of two thousand, and 64 of them fit into registers.
2. The threshold is the smallest u with W(order > u) < target, where W counts tokens (target k) or adds
   up their masses exp(v) (target top_p of the whole). W falls as u grows, so u is found by bisection.
3. Of the tokens that tie at u as many are kept as the target still wants, the lowest ids first.

Sums are in float32, each in one order that the row alone decides: they never depend on other rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.adjusted_logits import AdjustedLogits, is_adjusted, load_adjusted
from graphllm.kernels.row_maxima import RowMaxima, is_limited_by_count, row_maximum, tempered
from graphllm.kernels.sampled_rows import (
    MIN_P,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    SampledRows,
    line_of,
    load_float,
    load_int,
)
from graphllm.kernels.top_tokens import LOWEST_ORDER, order_of, value_of, value_of_key
from graphllm.kernels.triton_support import launch_options, release_successor, wait_for_predecessor
from graphllm.kernels.vocab_tiles import TILE_SIZE, num_chunks, num_tiles

CANDIDATE_TILES = 64
"""Tiles that are looked at together; 4,096 tokens, 8 for each of 512 threads."""
NUM_CANDIDATES = CANDIDATE_TILES * TILE_SIZE

_TILE: tl.constexpr = tl.constexpr(TILE_SIZE)
_TILES: tl.constexpr = tl.constexpr(CANDIDATE_TILES)
_CAPACITY: tl.constexpr = tl.constexpr(NUM_CANDIDATES)
_KEEPS_ALL: tl.constexpr = tl.constexpr(-(2**31))
_ALL_TIES: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def is_kept(values, ids, threshold, last_id):
    """Which tokens may be drawn; values: tempered."""
    orders = order_of(values)
    return (orders > threshold) | ((orders == threshold) & (ids <= last_id))


@triton.jit
def _weights_of(orders, by_mass):
    return tl.where(by_mass, tl.exp(value_of(orders)), 1.0)


@triton.jit
def _pivot(low, high):
    """An order strictly between two others, by value where the values are those of likely tokens.

    Integers halve the exponents first, most of which belong to differences that no two logits have.
    """
    middle = order_of(0.5 * (tl.maximum(value_of(low), -64.0) + value_of(high)))
    middle = tl.where(value_of(high) > -64.0, middle, low + (high - low) // 2)
    return tl.minimum(tl.maximum(middle, low + 1), high - 1)


@triton.jit
def _bisect(orders, by_mass, target, low, high, weight_above):
    """The smallest u in (low, high] with W(order > u) < target, or the smallest order if all are.

    orders: [n], all candidates in (low, high]; others may be among them and do not count.
    weight_above: W(order > high), below the target. Returns u, W(order > u), how many tie at u.
    Both ends move on to the next order that exists, so that ties end the search as soon as they are met.
    """
    inside = (orders > low) & (orders <= high)
    orders = tl.where(inside, orders, LOWEST_ORDER)
    weights = tl.where(inside, _weights_of(orders, by_mass), 0.0)
    low = tl.min(tl.where(inside, orders, high), 0) - 1
    high = tl.maximum(tl.max(orders, 0), low + 1)
    while high - low > 1:
        is_above = orders > _pivot(low, high)
        if weight_above + tl.sum(tl.where(is_above, weights, 0.0), 0) >= target:
            low = tl.min(tl.where(is_above, orders, high), 0) - 1
        else:
            high = tl.maximum(tl.max(tl.where(is_above, LOWEST_ORDER, orders), 0), low + 1)
    weight = weight_above + tl.sum(tl.where(orders > high, weights, 0.0), 0)
    return high, weight, tl.sum((orders == high).to(tl.int32), 0)


@triton.jit
def _tile_bound(tile_orders, by_mass, target):
    """The largest order at which tile maxima alone weigh the target; LOWEST_ORDER if they never do."""
    weights = tl.where(tile_orders > LOWEST_ORDER, _weights_of(tile_orders, by_mass), 0.0)
    bound = LOWEST_ORDER
    if tl.sum(weights, 0) >= target:
        low = tl.full((), LOWEST_ORDER, tl.int32)
        bound, _, _ = _bisect(tile_orders, by_mass, target, low, tl.full((), 0, tl.int32), 0.0)
    return bound


# A row is a tuple: its logits, their changed copy, its mask, its list of tiles, whether it is adjusted,
# its maximum and its temperature.
@triton.jit
def _load_orders(row, first, num_listed, VOCAB: tl.constexpr, HAS_MASKS: tl.constexpr):
    """Orders and ids of the listed tiles from `first` on: [4096] each, in ascending order of ids."""
    logits_row, changed_row, masks_row, tile_list, adjusted, maximum, temperature = row
    index = first + tl.arange(0, _TILES)
    listed = index < num_listed
    tiles = tl.load(tile_list + index, mask=listed, other=0)
    ids = tiles[:, None] * _TILE + tl.arange(0, _TILE)[None, :]
    values = load_adjusted(logits_row, changed_row, masks_row, ids, adjusted, VOCAB, HAS_MASKS)
    orders = tl.where(listed[:, None], order_of(tempered(values, maximum, temperature)), LOWEST_ORDER)
    return tl.reshape(orders, (_CAPACITY,)), tl.reshape(ids, (_CAPACITY,))


@triton.jit
def _weigh(row, num_listed, pivot, by_mass, VOCAB: tl.constexpr, HAS_MASKS: tl.constexpr):
    """Of listed tokens above the pivot: how many, their weight, the lowest order; then the highest below."""
    count = 0
    weight = 0.0
    lowest_above = 0
    highest_below = LOWEST_ORDER
    for first in range(0, num_listed, _TILES):
        orders, _ = _load_orders(row, first, num_listed, VOCAB, HAS_MASKS)
        is_above = orders > pivot
        count += tl.sum(is_above.to(tl.int32), 0)
        weight += tl.sum(tl.where(is_above, _weights_of(orders, by_mass), 0.0), 0)
        lowest_above = tl.minimum(lowest_above, tl.min(tl.where(is_above, orders, 0), 0))
        highest_below = tl.maximum(highest_below, tl.max(tl.where(is_above, LOWEST_ORDER, orders), 0))
    return count, weight, lowest_above, highest_below


@triton.jit
def _search(row, num_listed, candidates, by_mass, target, low, VOCAB: tl.constexpr, HAS_MASKS: tl.constexpr):
    """`_bisect` over all listed tokens above `low`: narrowed to 4,096 of them first."""
    high = tl.full((), 0, tl.int32)
    count_inside = num_listed * _TILE
    count_above = 0
    weight_above = 0.0
    while (count_inside > _CAPACITY) & (high - low > 1):
        count, weight, lowest_above, highest_below = _weigh(
            row, num_listed, _pivot(low, high), by_mass, VOCAB, HAS_MASKS
        )
        if weight >= target:
            low = lowest_above - 1
            count_inside = count - count_above
        else:
            high = tl.maximum(highest_below, low + 1)
            count_inside += count_above - count
            count_above = count
            weight_above = weight
    threshold = high
    weight = weight_above
    num_ties = count_inside
    if count_inside <= _CAPACITY:
        num_found = 0
        for first in range(0, num_listed, _TILES):
            orders, _ = _load_orders(row, first, num_listed, VOCAB, HAS_MASKS)
            inside = (orders > low) & (orders <= high)
            ranks = num_found + tl.cumsum(inside.to(tl.int32), 0)
            tl.store(candidates + ranks - 1, orders, mask=inside)
            num_found += tl.sum(inside.to(tl.int32), 0)
        tl.debug_barrier()
        lanes = tl.arange(0, _CAPACITY)
        orders = tl.load(candidates + lanes, mask=lanes < num_found, other=LOWEST_ORDER, cache_modifier=".cg")
        threshold, weight, num_ties = _bisect(orders, by_mass, target, low, high, weight_above)
        tl.debug_barrier()
    return threshold, weight, num_ties


@triton.jit
def _last_tie(row, num_listed, threshold, num_kept, VOCAB: tl.constexpr, HAS_MASKS: tl.constexpr):
    """The id of the `num_kept`-th token, in order of ids, that ties at the threshold."""
    last_id = 0
    num_seen = 0
    for first in range(0, num_listed, _TILES):
        orders, ids = _load_orders(row, first, num_listed, VOCAB, HAS_MASKS)
        ties = (orders == threshold).to(tl.int32)
        is_kept_tie = (ties > 0) & (num_seen + tl.cumsum(ties, 0) <= num_kept)
        last_id = tl.maximum(last_id, tl.max(tl.where(is_kept_tie, ids, 0), 0))
        num_seen += tl.sum(ties, 0)
    return last_id


@triton.jit
def _row_bound(
    tile_orders,
    best,
    masses,
    maximum,
    temperature,
    top_k,
    top_p,
    min_order,
    limits_count,
    VOCAB: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    NUM_TILES: tl.constexpr,
):
    """An order below which nothing has to be looked at, and the whole that top_p is a share of.

    The whole is that of all tokens: with top_k the caller works out another. top_p is a share of all
    top_k tokens, so they have to be looked at whatever min_p leaves of them.
    """
    bound = LOWEST_ORDER + 1
    whole = 0.0
    target = top_k.to(tl.float32)
    has_target = top_k <= NUM_TILES
    if (not limits_count) | (top_p >= 1.0):
        bound = tl.maximum(bound, min_order)
    if not limits_count:
        has_target = top_p < 1.0
        if has_target:
            chunks = tl.arange(0, CHUNKS_PADDED)
            in_row = chunks < NUM_CHUNKS
            keys = tl.load(best + chunks, mask=in_row, other=0)
            chunk_values = tempered(value_of_key(keys), maximum, temperature)
            chunk_masses = tl.load(masses + chunks, mask=in_row, other=0.0)
            whole = tl.sum(tl.where(in_row, tl.exp(chunk_values) * chunk_masses, 0.0), 0)
            # Slack for the rounding of sums that add the same masses in another order.
            target = top_p * whole * 1.0001
            # Tokens this small have less than 1 - top_p of the whole between them.
            bound = tl.maximum(bound, order_of(tl.log(0.99 * (1.0 - top_p) * whole / VOCAB)))
    if has_target:
        bound = tl.maximum(bound, _tile_bound(tile_orders, not limits_count, target))
    return tl.minimum(bound, 0), whole


@triton.jit
def _list_tiles(tile_orders, bound, tile_list, TILES_PADDED: tl.constexpr):
    """List the tiles that reach the bound, in ascending order; returns how many there are."""
    reaches = tile_orders >= bound
    ranks = tl.cumsum(reaches.to(tl.int32), 0)
    tl.store(tile_list + ranks - 1, tl.arange(0, TILES_PADDED), mask=reaches)
    tl.debug_barrier()
    return tl.sum(reaches.to(tl.int32), 0)


@triton.jit
def _filter_thresholds_kernel(
    logits,
    changed,
    masks,
    lines,
    slots,
    floats,
    ints,
    lengths,
    best,
    masses,
    tile_maxima,
    tile_lists,
    candidates,
    thresholds,
    VOCAB: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr,
    HAS_LINES: tl.constexpr,
    HAS_MASKS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    release_successor(PDL)
    pair = tl.program_id(0)
    slot = tl.load(slots + pair)
    temperature = load_float(floats, slot, TEMPERATURE)
    top_p = load_float(floats, slot, TOP_P)
    min_p = load_float(floats, slot, MIN_P)
    top_k = load_int(ints, slot, TOP_K)
    limits_count = is_limited_by_count(ints, slot, VOCAB)
    maximum = row_maximum(best, pair, NUM_CHUNKS, CHUNKS_PADDED)
    threshold = _KEEPS_ALL
    last_id = _ALL_TIES
    is_active = limits_count | (top_p < 1.0) | (min_p > 0.0)
    if is_active & (temperature > 0) & (maximum > float("-inf")):
        tile_list = tile_lists + pair * NUM_TILES
        orders = candidates + pair * _CAPACITY
        row = (
            logits + line_of(lines, pair, HAS_LINES) * VOCAB,
            changed + pair.to(tl.int64) * VOCAB,
            masks + pair * ((VOCAB + 31) // 32),
            tile_list,
            is_adjusted(floats, ints, lengths, slot),
            maximum,
            temperature,
        )
        min_order = order_of(tl.log(tl.where(min_p > 0.0, min_p, 1.0)))
        min_order = tl.where(min_p > 0.0, min_order, LOWEST_ORDER + 1)

        tiles = tl.arange(0, TILES_PADDED)
        values = tl.load(tile_maxima + pair * NUM_TILES + tiles, mask=tiles < NUM_TILES, other=float("-inf"))
        tile_orders = order_of(tempered(values, maximum, temperature))
        bound, whole = _row_bound(
            tile_orders,
            best + pair * NUM_CHUNKS,
            masses + pair * NUM_CHUNKS,
            maximum,
            temperature,
            top_k,
            top_p,
            min_order,
            limits_count,
            VOCAB,
            NUM_CHUNKS,
            CHUNKS_PADDED,
            NUM_TILES,
        )
        num_listed = _list_tiles(tile_orders, bound, tile_list, TILES_PADDED)

        threshold = bound
        num_ties = 0
        num_kept = 0
        # Counts first: top_p is a share of what top_k leaves. A loop, so that the search is compiled once.
        for by_mass in range(2):
            is_wanted = top_p < 1.0 if by_mass == 1 else limits_count
            if is_wanted:
                target = top_k.to(tl.float32)
                if by_mass == 1:
                    if limits_count:
                        _, whole, _, _ = _weigh(row, num_listed, threshold, True, VOCAB, HAS_MASKS)
                        whole += num_kept * tl.exp(value_of(threshold))
                    target = top_p * whole
                found, weight, ties = _search(
                    row, num_listed, orders, by_mass == 1, target, threshold - 1, VOCAB, HAS_MASKS
                )
                # As many of the ties as the target still wants, but one at least.
                missing = tl.maximum(tl.ceil((target - weight) / _weights_of(found, by_mass == 1)), 1.0)
                kept = tl.minimum(missing, ties.to(tl.float32)).to(tl.int32)
                is_same = limits_count & (found == threshold) & (by_mass == 1)
                num_kept = tl.where(is_same, tl.minimum(num_kept, kept), kept)
                threshold = found
                num_ties = ties
        if min_order > threshold:
            threshold = min_order
            num_kept = num_ties
        if num_kept < num_ties:
            last_id = _last_tie(row, num_listed, threshold, num_kept, VOCAB, HAS_MASKS)
    tl.store(thresholds + pair * 2, threshold)
    tl.store(thresholds + pair * 2 + 1, last_id)


def filter_thresholds(
    adjusted: AdjustedLogits,
    rows: SampledRows,
    maxima: RowMaxima,
    *,
    tile_lists: Tensor,
    candidates: Tensor,
    out: Tensor,
) -> Tensor:
    """Threshold and last id of each pair: [num_pairs, 2] int32; a row without filters keeps all.

    tile_lists [num_pairs, num_tiles] int32 and candidates [num_pairs, NUM_CANDIDATES] int32 are scratch.
    A kernel only.
    """
    vocab_size = adjusted.vocab_size
    chunks, tiles = num_chunks(vocab_size), num_tiles(vocab_size)
    _filter_thresholds_kernel[(rows.num_pairs,)](
        adjusted.logits,
        adjusted.changed,
        adjusted.masks_or_any,
        rows.lines_or_any,
        rows.slots,
        rows.floats,
        rows.ints,
        rows.lengths,
        maxima.best,
        maxima.masses,
        maxima.tiles,
        tile_lists,
        candidates,
        out,
        VOCAB=vocab_size,
        NUM_CHUNKS=chunks,
        CHUNKS_PADDED=triton.next_power_of_2(chunks),
        NUM_TILES=tiles,
        TILES_PADDED=triton.next_power_of_2(tiles),
        HAS_LINES=rows.lines is not None,
        HAS_MASKS=adjusted.masks is not None,
        num_warps=16,
        enable_fp_fusion=False,
        **launch_options(adjusted.logits.device),
    )
    return out
