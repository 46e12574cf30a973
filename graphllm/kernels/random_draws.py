"""Counter-based random numbers, and the Gumbel noise that belongs to each token.

Owns the generator, the layout of its counter, the uniform mapping and the noise. Nothing here has
state: a number is a function of (seed, sibling, position, purpose, index), so a draw does not
depend on what else is in the batch, on which tokens a filter left, or on the order of steps.

Generator: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3",
SC 2011). One round maps the counter (c0, c1, c2, c3) under the key (k0, k1) to

    (hi(M1 c2) ^ c1 ^ k0,  lo(M1 c2),  hi(M0 c0) ^ c3 ^ k1,  lo(M0 c0)),

then the key advances by (W0, W1). Here the key is the seed's low and high word, and the counter is
(purpose, index, position, sibling).

Uniform mapping: a word w becomes v = min((w + 1/2) / 2**32, 1 - 2**-24), in the open interval
(0, 1) in float32 too: at least 2**-33. Then e = -log(1 - v) is a standard exponential, between
2**-33 and 24 log 2.

Noise: token i has g_i = -log E_i, where the E_i are independent standard exponentials; the argmax
of s_i + g_i is then a draw from softmax(s) (Gumbel-max). The 64 exponentials of a tile are drawn
from the smallest up, which is what lets a whole tile be ruled out by one number:

    m = e(TILE, tile) / 64              the smallest of 64 exponentials, itself exponential
    j = uniform in 0..63                the token that has it
    E_i = m for i = j, else m + e(TOKEN, i)      an exponential beyond m is m plus an exponential

so every noise in the tile is at most -log m. All noise lies between -log(24 log 2 * 65/64) > -2.83
and 39 log 2 < 27.04.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.vocab_tiles import TILE_SIZE

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10
_WORD_MASK = 0xFFFFFFFF

NOISE_MIN = -2.83
NOISE_MAX = 27.04

_TILE_SIZE: tl.constexpr = tl.constexpr(TILE_SIZE)


class DrawPurpose(IntEnum):
    """What a random number is for: streams of different purposes never share a number."""

    TILE = 0  # index: tile; word 0 gives the tile's smallest exponential, word 1 its token
    TOKEN = 1  # index: token // 4; word token % 4 gives the token's own exponential


_TILE: tl.constexpr = tl.constexpr(int(DrawPurpose.TILE))
_TOKEN: tl.constexpr = tl.constexpr(int(DrawPurpose.TOKEN))


@dataclass(frozen=True, slots=True)
class DrawKeys:
    """Which random numbers each row uses: three tensors [num_rows] int64.

    seeds: any 64-bit value. siblings: index of the sequence in its request. positions: absolute
    position of the token to be sampled (the number of tokens before it).
    """

    seeds: Tensor
    siblings: Tensor
    positions: Tensor

    def select(self, rows: Tensor) -> DrawKeys:
        """The keys of `rows` ([n] int64), in that order and as often as named."""
        return DrawKeys(self.seeds[rows], self.siblings[rows], self.positions[rows])

    def words(self, purpose: DrawPurpose, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Four words for each of `indices` ([num_rows, n] or [1, n] int64): [num_rows, n] int64."""
        seeds = self.seeds[:, None]
        counter = (
            torch.full_like(seeds, int(purpose)),
            indices,
            self.positions[:, None] & _WORD_MASK,
            self.siblings[:, None] & _WORD_MASK,
        )
        return philox4x32_ref(counter, (seeds & _WORD_MASK, (seeds >> 32) & _WORD_MASK))


def philox4x32_ref(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32: four words in int64 tensors, each in [0, 2**32).

    counter, key: int64 tensors of words, of any shapes that broadcast together.
    """
    c0, c1, c2, c3 = counter
    # 0-dimensional tensors: a Python integer would be wrapped anew by each of a hundred operations.
    multiplier0, multiplier1, word_mask, word_bits = torch.tensor(
        [*_MULTIPLIERS, _WORD_MASK, 32], device=c0.device
    ).unbind()
    rounds = torch.arange(_NUM_ROUNDS, device=c0.device)
    keys0 = ((key[0][..., None] + rounds * _KEY_STEPS[0]) & word_mask).unbind(-1)
    keys1 = ((key[1][..., None] + rounds * _KEY_STEPS[1]) & word_mask).unbind(-1)
    for k0, k1 in zip(keys0, keys1, strict=True):
        # int64 products wrap at 2**64, which keeps all 64 bits; the shift's copies of the sign bit
        # are masked away. c1 and c3 carry their upper halves along: nothing reads those.
        product0 = c0 * multiplier0
        product1 = c2 * multiplier1
        c0 = ((product1 >> word_bits) ^ (c1 ^ k0)).bitwise_and_(word_mask)
        c2 = ((product0 >> word_bits) ^ (c3 ^ k1)).bitwise_and_(word_mask)
        c1, c3 = product1, product0
    return c0, c1 & word_mask, c2, c3 & word_mask


def exponential_ref(words: Tensor) -> Tensor:
    """Standard exponentials from words: float32, between 2**-33 and 24 log 2."""
    uniforms = ((words.to(torch.float32) + 0.5) * 2.0**-32).clamp_(max=1.0 - 2.0**-24)
    return uniforms.neg_().log1p_().neg_()


def tile_minima_ref(keys: DrawKeys, tile_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest exponential of tiles, and the token in 0..63 that has it.

    tile_ids: [num_rows, n] or [1, n] int64. Returns [num_rows, n] float32 and int64.
    """
    first, second, _, _ = keys.words(DrawPurpose.TILE, tile_ids)
    return exponential_ref(first) / TILE_SIZE, second * TILE_SIZE >> 32


def gumbel_noise_ref(keys: DrawKeys, token_ids: Tensor) -> Tensor:
    """The noise of each token: [num_rows, n] float32, in (NOISE_MIN, NOISE_MAX).

    token_ids: [num_rows, n] or [1, n] int64.
    """
    minima, owners = tile_minima_ref(keys, token_ids // TILE_SIZE)
    words = torch.stack(keys.words(DrawPurpose.TOKEN, token_ids // 4))  # [4, num_rows, n]
    own_words = words.gather(0, (token_ids % 4).expand(words.shape[1:])[None])[0]
    excess = exponential_ref(own_words).masked_fill_(owners == token_ids % TILE_SIZE, 0.0)
    return -(minima + excess).log_()


@triton.jit
def draw_words(seed, sibling, position, indices, PURPOSE: tl.constexpr):
    """`DrawKeys.words` of one row: four uint32 tensors of the shape of `indices` (int32).

    seed, sibling, position: int64. Triton's own Philox is the same generator: ten rounds, and the key
    is the seed's low and high word.
    """
    zeros = (indices * 0).to(tl.uint32)
    return tl.philox(
        seed.to(tl.uint64),
        zeros + PURPOSE,
        indices.to(tl.uint32),
        zeros + position.to(tl.uint32),
        zeros + sibling.to(tl.uint32),
    )


@triton.jit
def exponential(words):
    """`exponential_ref` of uint32 words.

    log(1 - u) alone would lose the digits of a small u. Where t = 1 - u is rounded, log(t) u / (1 - t)
    puts them back (W. Kahan's log1p), which needs nothing but a logarithm that is right near 1.
    """
    uniforms = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355224609375)
    rest = 1.0 - uniforms
    is_tiny = rest == 1.0
    lost = tl.where(is_tiny, 1.0, 1.0 - rest)
    return tl.where(is_tiny, uniforms, -tl.log(rest) * tl.div_rn(uniforms, lost))


@triton.jit
def tile_noise(seed, sibling, position, first_tile, TILES: tl.constexpr):
    """`gumbel_noise_ref` of TILES neighbouring tiles of one row: [TILES * 64] float32."""
    tiles = first_tile + tl.arange(0, TILES)
    first, second, _, _ = draw_words(seed, sibling, position, tiles, _TILE)
    minima = exponential(first) * (1.0 / _TILE_SIZE)
    owners = (second >> 26).to(tl.int32)  # the upper six bits: 64 times the word, over 2**32
    groups = first_tile * (_TILE_SIZE // 4) + tl.arange(0, TILES * _TILE_SIZE // 4)
    word0, word1, word2, word3 = draw_words(seed, sibling, position, groups, _TOKEN)
    words = tl.join(tl.join(word0, word2), tl.join(word1, word3))  # the last index is the lowest bit
    excess = exponential(tl.reshape(words, (TILES, _TILE_SIZE)))
    lanes = tl.arange(0, _TILE_SIZE)
    excess = tl.where(lanes[None, :] == owners[:, None], 0.0, excess)
    return tl.reshape(-tl.log(minima[:, None] + excess), (TILES * _TILE_SIZE,))
