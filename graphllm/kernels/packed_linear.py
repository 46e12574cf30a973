"""The product of a linear layer whose weight is packed in 4 or 8 bits (`packed_weight.py`).

    y_{t,n} = sum_k x_{t,k} * weight_{n,k} + bias_n

One row is multiplied on CUDA cores, with 5 instructions for a weight of 4 bits (counted in the compiled
code). More rows go to matrix units in tiles; each program makes plain numbers of its codes in registers, with
6 instructions a weight whatever the rows, so for up to 64 rows a weight leaves memory once. Where the outputs
alone do not fill a card, `splits` programs share a sum and the last to arrive adds the parts in their order,
as in `skinny_linear.py`.

More than 64 rows are cut into tiles of 128, which make the same numbers again, in about the time of their
products. Making the whole weight plain costs 2.5 bytes of traffic a weight, once: at 3 TB/s that is the
time of 330 rows' products at 790 TFLOP/s. So above MAX_TILED_ROWS the weight is made plain, a slice that
stays in the L2 cache at a time, and cuBLAS multiplies (`packed_dense.py`).

Owns the reference, the kernel and the choice of its form.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphllm.kernels.gated_activation import Activation, activate, gated_activation_ref
from graphllm.kernels.linear import LinearProduct, LinearWorkspace, linear_ref
from graphllm.kernels.packed_streams import stream_packed_dot, stream_packed_gemv
from graphllm.kernels.packed_tiles import packed_arguments, span_of
from graphllm.kernels.packed_weight import PackedFormat, PackedWeight, dequantize
from graphllm.kernels.skinny_linear import add_parts, store_rows
from graphllm.kernels.triton_support import launch_options, runs_triton, widen

MAX_GEMV_ROWS = 1
MAX_TILED_ROWS = 512
MAX_SPLITS = 4
_MAX_SPLIT_ROWS = 64
_PROGRAMS_PER_MULTIPROCESSOR = 2


@dataclass(frozen=True, slots=True)
class PackedConfig:
    """How `packed_linear` cuts its work.

    form: "gemv" on CUDA cores or "dot" on matrix units. rows: of x in a program. block_n, block_k: rows and
    columns of weights in a tile. splits: programs that share a sum.
    """

    form: Literal["gemv", "dot"]
    rows: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


def packed_config(
    num_rows: int, out_features: int, in_features: int, form: PackedFormat, *, num_multiprocessors: int
) -> PackedConfig:
    """The configuration for a product of these sizes: a function of nothing else."""
    if num_rows > _MAX_SPLIT_ROWS:
        return PackedConfig("dot", 128, 128, 64, 1, num_warps=8, num_stages=3)
    if num_rows <= MAX_GEMV_ROWS:
        # 512 bytes of a row of codes are 16 for each thread of a warp, which then adds them up by itself.
        config = PackedConfig("gemv", 1, 8, 512 * (8 // form.bits), 1, num_warps=2, num_stages=3)
    else:
        rows = max(16, triton.next_power_of_2(num_rows))
        config = PackedConfig("dot", rows, 64, 128, 1, num_warps=4, num_stages=4 if rows == 16 else 3)
    num_groups, num_tiles = (
        triton.cdiv(out_features, config.block_n),
        triton.cdiv(in_features, config.block_k),
    )
    splits = 1
    while (
        splits < MAX_SPLITS
        and num_groups * splits < _PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors
        and num_tiles >= 4 * splits
    ):
        splits *= 2
    return dataclasses.replace(config, splits=splits)


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a card; under the interpreter that of a small one."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


def packed_workspace_size(
    out_features: int, in_features: int, form: PackedFormat, device: torch.device
) -> tuple[int, int]:
    """(numbers of `partials`, numbers of `counters`) that products with such a weight need at most."""
    num_partials = num_counters = 0
    for num_rows in (1, 16, 32, 64):
        config = packed_config(
            num_rows, out_features, in_features, form, num_multiprocessors=num_multiprocessors(device)
        )
        if config.splits > 1:
            num_partials = max(num_partials, config.splits * config.rows * out_features)
            num_counters = max(num_counters, triton.cdiv(out_features, config.block_n))
    return num_partials, num_counters


def packed_linear_ref(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor, *, product: LinearProduct = linear_ref
) -> Tensor:
    """x: [num_rows, in_features]; bias: [out_features] or None. Writes [num_rows, out_features] into `out`,
    of x's dtype or float32, and returns it.

    The plain weight, rounded to x's dtype, by `product`.
    """
    return product(x, dequantize(weight, dtype=x.dtype), bias, out)


def packed_gated_linear_ref(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, activation: Activation, *, out: Tensor
) -> Tensor:
    """The weight's rows are gates and then as many factors: writes f(gates) * factors [num_rows,
    out_features / 2] into `out`, of x's dtype, and returns it."""
    gate_up = torch.empty(x.shape[0], weight.out_features, dtype=x.dtype, device=x.device)
    return gated_activation_ref(packed_linear_ref(x, weight, bias, gate_up), activation, out=out)


@triton.jit(do_not_specialize=["num_rows"])
def _packed_linear_kernel(
    x,  # [num_rows, IN_FEATURES]
    codes,  # [OUT_FEATURES, bytes]
    scales,  # [OUT_FEATURES, groups]
    zeros,  # [OUT_FEATURES, groups]
    order,  # [IN_FEATURES] int32 where HAS_ORDER
    codebook,  # [16] float32
    bias,  # [OUT_FEATURES] where HAS_BIAS
    out,  # [num_rows, OUT_FEATURES], where GATED [num_rows, OUT_FEATURES / 2]
    partials,  # [SPLITS, ROWS, OUT_FEATURES] float32 where SPLITS > 1
    counters,  # [num_groups] int32 where SPLITS > 1
    num_rows,
    OUT_FEATURES: tl.constexpr,
    IN_FEATURES: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    ZERO: tl.constexpr,
    CODEBOOK: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    SCALES_SUMS: tl.constexpr,
    HAS_WORDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    USES_DOT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,
    SPLITS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    first_row = tl.program_id(0) * ROWS
    group = tl.program_id(1)
    split = tl.program_id(2)
    GATED: tl.constexpr = ACTIVATION != "none"
    NUM_TILES: tl.constexpr = (IN_FEATURES + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K)
    IS_WHOLE: tl.constexpr = IN_FEATURES % (SPLITS * BLOCK_K) == 0
    positions = tl.arange(0, BLOCK_N)
    if GATED:
        # Gates and factors alternate, so the last step is a split of neighbours.
        INTERMEDIATE: tl.constexpr = OUT_FEATURES // 2
        features = group * (BLOCK_N // 2) + positions // 2
        weight_rows = (positions % 2) * INTERMEDIATE + tl.minimum(features, INTERMEDIATE - 1)
    else:
        features = group * BLOCK_N + positions
        # A last program that is not full repeats the last row of weights, and stores it once.
        weight_rows = tl.minimum(features, OUT_FEATURES - 1)
    rows = first_row + tl.arange(0, ROWS)
    row_offsets = tl.minimum(rows, num_rows - 1).to(tl.int64) * IN_FEATURES
    if USES_DOT:
        sums = tl.trans(
            stream_packed_dot(
                x,
                row_offsets,
                codes,
                scales,
                zeros,
                order,
                codebook,
                weight_rows.to(tl.int64),
                split * (NUM_TILES * BLOCK_K),
                IN_FEATURES,
                BITS,
                GROUP,
                ZEROS,
                ZERO,
                CODEBOOK,
                HAS_ORDER,
                SCALES_SUMS,
                HAS_WORDS,
                NUM_TILES,
                IS_WHOLE,
                ROWS,
                BLOCK_N,
                BLOCK_K,
                SPAN,
                NUM_STAGES,
                PDL,
            )
        )
    else:
        sums = stream_packed_gemv(
            x,
            row_offsets,
            codes,
            scales,
            zeros,
            order,
            codebook,
            weight_rows.to(tl.int64),
            split * (NUM_TILES * BLOCK_K),
            IN_FEATURES,
            BITS,
            GROUP,
            ZEROS,
            ZERO,
            CODEBOOK,
            HAS_ORDER,
            SCALES_SUMS,
            HAS_WORDS,
            NUM_TILES,
            IS_WHOLE,
            ROWS,
            BLOCK_N,
            BLOCK_K,
            NUM_STAGES,
            PDL,
        )
    if GATED:
        if HAS_BIAS:
            sums += widen(tl.load(bias + weight_rows))[None, :]
        dtype: tl.constexpr = out.dtype.element_ty
        gate, up = tl.split(tl.reshape(sums.to(dtype), (ROWS, BLOCK_N // 2, 2)))
        activated = activate(widen(gate), ACTIVATION).to(dtype)
        places = group * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)[None, :]
        stored = rows.to(tl.int64)[:, None] * INTERMEDIATE + places
        mask = (rows < num_rows)[:, None] & (places < INTERMEDIATE)
        tl.store(out + stored, (widen(activated) * widen(up)).to(dtype), mask)
    else:
        offsets = rows.to(tl.int64)[:, None] * OUT_FEATURES + weight_rows[None, :]
        mask = (rows < num_rows)[:, None] & (features < OUT_FEATURES)[None, :]
        if SPLITS == 1:
            store_rows(out, bias, sums, offsets, weight_rows, mask, HAS_BIAS)
        else:
            PART_SIZE: tl.constexpr = ROWS * OUT_FEATURES
            tl.store(partials + split * PART_SIZE + offsets, sums, mask)
            # The counter is one thread's, the parts are all threads': first they must all have stored.
            tl.debug_barrier()
            num_before = tl.atomic_add(counters + group, 1, sem="acq_rel", scope="gpu")
            if num_before == SPLITS - 1:
                tl.store(counters + group, 0)  # for the next launch
                sums = add_parts(partials, offsets, mask, PART_SIZE, SPLITS)
                store_rows(out, bias, sums, offsets, weight_rows, mask, HAS_BIAS)


def packed_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    out: Tensor,
    *,
    workspace: LinearWorkspace,
    config: PackedConfig | None = None,
) -> Tensor:
    """See `packed_linear_ref`. The kernel needs all tensors contiguous, and of `workspace` what
    `packed_workspace_size` says; its products run one after the other. config: None chooses."""
    if not runs_triton(x):
        return packed_linear_ref(x, weight, bias, out)
    num_rows, out_features = x.shape[0], weight.out_features
    assert out.shape == (num_rows, out_features)
    if config is None:
        config = _config_for(x, weight)
    if config.splits > 1:
        assert config.rows >= num_rows and workspace.counters.numel() >= triton.cdiv(
            out_features, config.block_n
        )
        assert workspace.partials.numel() >= config.splits * config.rows * out_features
    return _launch(x, weight, bias, out, workspace=workspace, config=config, activation="none")


def packed_gated_linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    activation: Activation,
    *,
    out: Tensor,
    config: PackedConfig | None = None,
) -> Tensor:
    """See `packed_gated_linear_ref`. The kernel needs all tensors contiguous."""
    if not runs_triton(x):
        return packed_gated_linear_ref(x, weight, bias, activation, out=out)
    assert out.shape == (x.shape[0], weight.out_features // 2) and out.dtype == x.dtype
    if config is None:
        config = _config_for(x, weight)
    nothing = LinearWorkspace(x, x)
    # What a program has are both factors of its outputs, whole.
    whole = dataclasses.replace(config, splits=1)
    return _launch(x, weight, bias, out, workspace=nothing, config=whole, activation=activation)


def _config_for(x: Tensor, weight: PackedWeight) -> PackedConfig:
    return packed_config(
        x.shape[0],
        weight.out_features,
        weight.in_features,
        weight.format,
        num_multiprocessors=num_multiprocessors(x.device),
    )


def _launch(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    out: Tensor,
    *,
    workspace: LinearWorkspace,
    config: PackedConfig,
    activation: Activation | Literal["none"],
) -> Tensor:
    num_rows, out_features = x.shape[0], weight.out_features
    if num_rows == 0:
        return out
    assert x.is_contiguous() and out.is_contiguous() and x.shape[1] == weight.in_features
    grid = (triton.cdiv(num_rows, config.rows), triton.cdiv(out_features, config.block_n), config.splits)
    _packed_linear_kernel[grid](
        x,
        bias=x if bias is None else bias,
        out=out,
        partials=workspace.partials,
        counters=workspace.counters,
        num_rows=num_rows,
        **packed_arguments(weight),
        OUT_FEATURES=out_features,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        USES_DOT=config.form == "dot",
        ROWS=config.rows,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPAN=span_of(weight, config.block_k),
        SPLITS=config.splits,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch_options(x.device),
    )
    return out
