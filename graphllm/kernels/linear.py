"""The product of a linear layer, and which library computes it on a CPU.

    y_{t,n} = sum_k x_{t,k} * weight_{n,k} + bias_n

torch's CPU build brings Intel's MKL and numpy's wheels bring OpenBLAS. On a CPU that is not Intel's the
second can be twice as fast, so a process measures both once (`choose_cpu_product`) and keeps one: a
product that changed with the number of rows would make a request's text depend on its neighbours.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# (x [num_tokens, in_features], weight [out_features, in_features], bias [out_features] or None)
# -> [num_tokens, out_features]
LinearProduct = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_TRIAL_ROWS = (1, 16)
# Weights must stream from memory, as they do in a step: more than a last-level cache holds.
_TRIAL_BYTES = 64 * 1024**2
_TRIAL_SECONDS = 0.25
_MIN_TRIAL_ROUNDS = 2


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [num_tokens, in_features]; returns [num_tokens, out_features] of x's dtype; any device."""
    return F.linear(x, weight, bias)


def linear_openblas(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same through numpy's BLAS, over the same memory; float32 on the CPU only.

    A batch with equal strides is read in place, otherwise numpy copies it first.
    """
    product = torch.from_numpy(np.dot(x.numpy(), weight.numpy().T))  # [num_tokens, out_features]
    return product if bias is None else product.add_(bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `linear_ref`."""
    return linear_ref(x, weight, bias)


def set_openblas_threads(num_threads: int) -> bool:
    """Limit numpy's OpenBLAS, process-wide, to `num_threads`; False when it cannot be reached.

    OpenBLAS has no Python interface, so the library inside numpy's wheel is asked by its C name.
    """
    package = Path(np.__file__).parent
    folders = (package.parent / "numpy.libs", package / ".dylibs")
    for path in (path for folder in folders for path in sorted(folder.glob("*openblas*"))):
        library = ctypes.CDLL(str(path))  # already loaded by numpy: this is a second handle to it
        for name in ("scipy_openblas_set_num_threads64_", "scipy_openblas_set_num_threads"):
            set_num_threads = getattr(library, name, None)
            if set_num_threads is not None:
                set_num_threads(ctypes.c_int(num_threads))
                return True
    return False


@dataclass(frozen=True, slots=True)
class CpuProductChoice:
    """The product chosen, its name, and the milliseconds that each candidate took at each row count."""

    product: LinearProduct
    name: str
    milliseconds: dict[str, dict[int, float]]


def choose_cpu_product(shapes: Sequence[tuple[int, int]], *, num_threads: int) -> CpuProductChoice:
    """Time torch and OpenBLAS on float32 matrices of these shapes; takes less than half a second.

    shapes: (out_features, in_features) of a model's layers, which the trial repeats or cuts to fill a
    fixed amount of memory. Sets OpenBLAS's threads to `num_threads`, to be the same as torch's. The
    smaller product of the times at 1 and at 16 rows wins; the minimum over interleaved rounds counts,
    because a busy neighbour only ever adds time.

    Where OpenBLAS wins, the calling thread's torch operations are left with one thread: two pools whose
    idle threads spin take each other's cores, and what is not a product is too small to share out.
    """
    candidates: dict[str, LinearProduct] = {"torch": linear_ref}
    if set_openblas_threads(num_threads):
        candidates["openblas"] = linear_openblas
    if len(candidates) == 1:
        return CpuProductChoice(linear_ref, "torch", {})
    weights = _trial_weights(shapes)
    inputs = {rows: [torch.ones(rows, weight.shape[1]) for weight in weights] for rows in _TRIAL_ROWS}
    best = {name: dict.fromkeys(_TRIAL_ROWS, math.inf) for name in candidates}
    start, num_rounds = time.perf_counter(), 0
    while num_rounds < _MIN_TRIAL_ROUNDS or time.perf_counter() - start < _TRIAL_SECONDS:
        for rows in _TRIAL_ROWS:
            for name, product in candidates.items():
                began = time.perf_counter()
                for x, weight in zip(inputs[rows], weights, strict=True):
                    product(x, weight, None)
                best[name][rows] = min(best[name][rows], (time.perf_counter() - began) * 1e3)
        num_rounds += 1
    name = min(candidates, key=lambda name: math.prod(best[name].values()))
    if name == "openblas":
        torch.set_num_threads(1)
    return CpuProductChoice(candidates[name], name, best)


def _trial_weights(shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Matrices of the shapes in turn, written once so that they are memory and not the zero page."""
    weights: list[Tensor] = []
    num_elements = _TRIAL_BYTES // 4
    while num_elements > 0:
        out_features, in_features = shapes[len(weights) % len(shapes)]
        rows = min(out_features, -(-num_elements // in_features))
        weights.append(torch.full((rows, in_features), 0.01))
        num_elements -= rows * in_features
    return weights
