"""The product of a linear layer, and who computes it.

    y_{t,n} = sum_k x_{t,k} * weight_{n,k} + bias_n

On a card that is cuBLAS, or for a few rows `skinny_linear` where the table of `linear_choice.py` says that
it was measured to be faster.

torch's CPU build brings Intel's MKL and numpy's wheels bring OpenBLAS. On a CPU that is not Intel's the
second can be twice as fast, so there a process measures both once (`choose_cpu_product`) and keeps one: a
product that changed with the number of rows would make a request's text depend on its neighbours.

Idle threads of OpenBLAS and of torch's OpenMP keep spinning for milliseconds, in wait for the next call.
Two pools on the same cores stall each other (measured: a decode step six times slower), so only the
library that computes the products has more than one thread.
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
from torch import Tensor

from graphllm.kernels.linear_choice import (
    ROW_BUCKETS,
    LinearTable,
    SkinnyConfig,
    capability_of,
    choose_linear,
)
from graphllm.kernels.skinny_linear import skinny_linear, skinny_num_counters, skinny_scratch_bytes
from graphllm.kernels.triton_support import runs_triton

# (x [num_tokens, in_features], weight [out_features, in_features], bias [out_features] or None,
#  out [num_tokens, out_features]) -> out
LinearProduct = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]

_TRIAL_ROWS = (1, 16)
# Weights must stream from memory, as they do in a step: more than a last-level cache holds.
_TRIAL_BYTES = 64 * 1024**2
_TRIAL_ROUNDS = 3
_TRIAL_SECONDS = 0.35
# Below this, calls cost more than products, and a trial more than it could ever save.
_MIN_BYTES_WORTH_A_TRIAL = 1024**2
# How long idle threads of either pool may go on spinning.
_SPIN_SECONDS = 0.03
# With OpenBLAS the rest of a step, attention above all, has one thread. That costs a few percent with two
# threads and more with each: OpenBLAS must win clearly, and on many cores torch stays.
_MAX_OPENBLAS_THREADS = 4
_CLEAR_WIN = 0.85


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """x: [num_tokens, in_features]; writes [num_tokens, out_features] into `out` and returns it.

    Any device; out is contiguous, of x's dtype or float32. On a card this is cuBLAS, which writes float32
    without rounding the sums to x's dtype first.
    """
    if out.dtype == x.dtype:
        if bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(bias, x, weight.t(), out=out)
    if x.is_cuda:
        torch.mm(x, weight.t(), out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(x, weight.t()))
    return out if bias is None else out.add_(bias)


def linear_openblas(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """The same through numpy's BLAS, over the same memory; float32 on the CPU only.

    A batch with equal strides is read in place, otherwise numpy copies it first.
    """
    np.dot(x.numpy(), weight.numpy().T, out=out.numpy())
    return out if bias is None else out.add_(bias)


@dataclass(frozen=True, slots=True)
class LinearWorkspace:
    """What products with split sums need beside their operands; they must run one after the other.

    partials: float32, any values. counters: int32, zeros between launches.
    """

    partials: Tensor
    counters: Tensor

    def holds(self, num_rows: int, out_features: int, config: SkinnyConfig) -> bool:
        return self.partials.nbytes >= skinny_scratch_bytes(
            num_rows, out_features, config
        ) and self.counters.numel() >= skinny_num_counters(out_features, config)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    workspace: LinearWorkspace,
    table: LinearTable | None = None,
) -> Tensor:
    """See `linear_ref`; on a card by the kernel that `table` (None: the one in force) names for the shape.

    A configuration whose split sums need more than the workspace holds is passed over for cuBLAS.
    """
    if runs_triton(x):
        num_rows, (out_features, in_features) = x.shape[0], weight.shape
        config = choose_linear(
            num_rows,
            out_features,
            in_features,
            dtype=weight.dtype,
            capability=capability_of(x.device),
            table=table,
        )
        if config is not None and workspace.holds(num_rows, out_features, config):
            partials, counters = workspace.partials, workspace.counters
            return skinny_linear(x, weight, bias, out, config=config, partials=partials, counters=counters)
    return linear_ref(x, weight, bias, out)


@dataclass(frozen=True, slots=True)
class GpuProduct:
    """A LinearProduct: `linear` with a workspace and a table."""

    workspace: LinearWorkspace
    table: LinearTable | None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        return linear(x, weight, bias, out, workspace=self.workspace, table=self.table)


def gpu_product(
    shapes: Sequence[tuple[int, int]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    table: LinearTable | None = None,
) -> GpuProduct:
    """`linear` with a workspace of its own, for a model whose products run one after the other.

    shapes: (out_features, in_features) of all of the model's products, its head's too. The workspace is
    allocated here, once, and its addresses may be captured.
    """
    num_bytes = num_counters = 0
    capability = capability_of(device)
    for out_features, in_features in set(shapes):
        for rows in ROW_BUCKETS:
            config = choose_linear(
                rows, out_features, in_features, dtype=dtype, capability=capability, table=table
            )
            if config is not None:
                num_bytes = max(num_bytes, skinny_scratch_bytes(rows, out_features, config))
                num_counters = max(num_counters, skinny_num_counters(out_features, config))
    workspace = LinearWorkspace(
        torch.empty(num_bytes // 4, dtype=torch.float32, device=device),
        torch.zeros(num_counters, dtype=torch.int32, device=device),
    )
    return GpuProduct(workspace, table)


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


def give_threads(product: LinearProduct, num_threads: int) -> None:
    """Give `num_threads` to the library behind `product` and one to the other.

    torch's number is that of the calling thread, so call this where the model will run.
    """
    is_openblas = product is linear_openblas
    torch.set_num_threads(1 if is_openblas else num_threads)
    set_openblas_threads(num_threads if is_openblas else 1)


@dataclass(frozen=True, slots=True)
class CpuProductChoice:
    """The product chosen, its name, and the milliseconds that each candidate took at each row count.

    The last is empty where there was nothing to choose.
    """

    product: LinearProduct
    name: str
    milliseconds: dict[str, dict[int, float]]


def choose_cpu_product(shapes: Sequence[tuple[int, int]], *, num_threads: int) -> CpuProductChoice:
    """Time torch and OpenBLAS on float32 matrices of these shapes; takes less than half a second.

    shapes: (out_features, in_features) of a model's layers, which the trial repeats or cuts to fill a
    fixed amount of memory; below a megabyte in all there is no trial. The geometric mean of the times at 1
    and at 16 rows decides; the best round counts, because a busy neighbour only ever adds time.

    Leaves the chosen library with `num_threads` threads: see `give_threads`.
    """
    is_small = 4 * sum(math.prod(shape) for shape in shapes) < _MIN_BYTES_WORTH_A_TRIAL
    if is_small or num_threads > _MAX_OPENBLAS_THREADS or not set_openblas_threads(num_threads):
        give_threads(linear_ref, num_threads)
        return CpuProductChoice(linear_ref, "torch", {})
    weights = _trial_weights(shapes)
    inputs = {rows: [torch.ones(rows, weight.shape[1]) for weight in weights] for rows in _TRIAL_ROWS}
    outs = {rows: [torch.empty(rows, len(weight)) for weight in weights] for rows in _TRIAL_ROWS}
    candidates: dict[str, LinearProduct] = {"torch": linear_ref, "openblas": linear_openblas}
    best = {name: dict.fromkeys(_TRIAL_ROWS, math.inf) for name in candidates}
    began = time.perf_counter()
    for num_rounds in range(_TRIAL_ROUNDS):
        if num_rounds and time.perf_counter() - began > _TRIAL_SECONDS:
            break
        for name, product in candidates.items():
            give_threads(product, num_threads)
            for rows in _TRIAL_ROWS:
                start = time.perf_counter()
                for x, weight, out in zip(inputs[rows], weights, outs[rows], strict=True):
                    product(x, weight, None, out)
                best[name][rows] = min(best[name][rows], (time.perf_counter() - start) * 1e3)
            time.sleep(_SPIN_SECONDS if num_threads > 1 else 0)
    cost = {name: math.sqrt(math.prod(times.values())) for name, times in best.items()}
    needed = _CLEAR_WIN if num_threads > 1 else 1.0
    name = "openblas" if cost["openblas"] < needed * cost["torch"] else "torch"
    give_threads(candidates[name], num_threads)
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
