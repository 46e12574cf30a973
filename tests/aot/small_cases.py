"""Kernels made to break the rules, and one that keeps them, with the launches that show it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from graphllm.kernels.triton_support import dot, launch_options, wait_for_predecessor
from tests.aot.recording import Card


@triton.jit(do_not_specialize=["count"])
def _good_kernel(x, out, count, PDL: tl.constexpr, SIZE: tl.constexpr):
    wait_for_predecessor(PDL)
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at, mask=at < count) * 2, mask=at < count)


@triton.jit
def _specializing_kernel(x, count, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(x + at, at, mask=at < count)


@triton.jit
def _product_kernel(x, out, PRECISION: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    a = tl.load(x + at)
    if PRECISION == "dot":
        product = dot(a, a, tl.zeros([SIZE, SIZE], tl.float32))
    else:
        product = tl.dot(a.to(tl.float32), a.to(tl.float32), input_precision=PRECISION)
    tl.store(out + at, product)


@triton.jit
def _spilling_kernel(x, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    values = tl.load(x + at)
    tl.store(x + at, values * tl.sum(values))


@triton.jit
def _greedy_kernel(x, out, ROWS: tl.constexpr, SIZE: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None] * SIZE
    accumulator = tl.zeros([ROWS, ROWS], tl.float32)
    columns = tl.arange(0, SIZE)[None, :]
    for step in tl.range(0, 8, num_stages=5):
        a = tl.load(x + step * ROWS * SIZE + rows + columns)
        accumulator = dot(a, tl.trans(a), accumulator)
    tl.store(out + tl.arange(0, ROWS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :], accumulator)


def good(card: Card) -> None:
    memory = card.tensor(4096, dtype=torch.bfloat16)
    out = card.tensor(1024, dtype=torch.bfloat16)
    for x in (memory[:1024], memory[2048:3072], memory[1:1025]):
        for count in (1, 5, 1024):
            _good_kernel[(1,)](x, out, count, SIZE=1024, num_warps=4, **launch_options(x.device))


def specializing(card: Card) -> None:
    for count in (1, 32):
        _specializing_kernel[(1,)](card.tensor(64, dtype=torch.int32), count, SIZE=64)


def products(card: Card) -> None:
    x = card.tensor(64, 64, dtype=torch.bfloat16)
    out = card.tensor(64, 64, dtype=torch.float32)
    _product_kernel[(1,)](x, out, PRECISION="dot", SIZE=64, num_warps=4)
    _product_kernel[(1,)](x, out, PRECISION="tf32", SIZE=64, num_warps=4)
    _product_kernel[(1,)](x, out, PRECISION="ieee", SIZE=16, num_warps=4)
    if card.has_e4m3:
        x = card.tensor(64, 64, dtype=torch.float8_e4m3fn)
        _product_kernel[(1,)](x, out, PRECISION="dot", SIZE=64, num_warps=4)


def spilling(card: Card) -> None:
    _spilling_kernel[(1,)](card.tensor(4096, dtype=torch.float32), SIZE=4096, num_warps=1, maxnreg=64)


def greedy(card: Card) -> None:
    x = card.tensor(8, 128, 512, dtype=torch.bfloat16)
    _greedy_kernel[(1,)](x, card.tensor(128, 128, dtype=torch.float32), ROWS=128, SIZE=512, num_warps=8)


CASES = (good, specializing, products, spilling, greedy)
