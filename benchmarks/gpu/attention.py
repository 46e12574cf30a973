"""Decode attention alone: its share of the copy bandwidth, and what raggedness costs.

    python -m benchmarks.gpu.attention

A CUDA graph holds what a step launches for several layers: the work list once, then each layer over a cache
of its own, so that no layer finds its keys in L2. Bytes are those of keys and values, which are all that
counts at 4k. The ragged and the uniform batch replay the same graph: only lengths and tables on the device
differ. Owns no kernel.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.ceilings import measure_ceilings
from benchmarks.gpu.command import failing, run_benchmark
from benchmarks.gpu.floors import ModelShape, shape_of
from benchmarks.gpu.results import ResultLog
from benchmarks.gpu.targets import RAGGED_METRIC, attention_metric
from benchmarks.gpu.timing import captured, time_on_device

if TYPE_CHECKING:
    import torch

SHAPES = ("llama-3.1-8b", "llama-3.2-1b")
BATCHES = (32, 64, 128)
CONTEXT = 4096
RAGGED = (16384, *[512] * 63)
UNIFORM = (sum(RAGGED) // len(RAGGED),) * len(RAGGED)
BLOCK_SIZE = 16
# Enough bytes that even the smallest batch is far beyond L2 between two visits of a cache.
_MIN_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Batch:
    """Device tensors of decode rows, as `AttentionInputs` has them, at addresses that stay."""

    inputs: Any
    num_rows: int

    def hold(self, contexts: Sequence[int], tables: torch.Tensor) -> None:
        """Make the rows have these contexts, over the blocks of `tables` [num_rows, max_blocks] int32."""
        import torch

        lens = torch.tensor(contexts, dtype=torch.int64, device=tables.device)
        self.inputs.context_lens.copy_(lens)
        self.inputs.positions.copy_(lens - 1)
        self.inputs.groups[0].block_tables[: self.num_rows, : tables.shape[1]].copy_(tables)
        blocks = tables.gather(1, ((lens - 1) // BLOCK_SIZE).unsqueeze(1)).squeeze(1)
        self.inputs.groups[0].slot_mapping.copy_(blocks * BLOCK_SIZE + (lens - 1) % BLOCK_SIZE)


def empty_batch(num_rows: int, max_context: int, *, device: torch.device) -> Batch:
    """Rows in slots 0, 1, ..., one query token each."""
    import torch

    from graphllm.attention.backend import AttentionInputs, GroupInputs

    def integers(*size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int64, device=device)

    rows = torch.arange(num_rows + 1, dtype=torch.int64, device=device)
    inputs = AttentionInputs(
        row_slots=rows[:-1].clone(),
        query_lens=torch.ones(num_rows, dtype=torch.int64, device=device),
        context_lens=integers(num_rows),
        query_starts=rows,
        positions=integers(num_rows),
        groups=(
            GroupInputs(
                slot_mapping=integers(num_rows),
                block_tables=torch.zeros(
                    num_rows, -(-max_context // BLOCK_SIZE), dtype=torch.int32, device=device
                ),
            ),
        ),
    )
    return Batch(inputs, num_rows)


def deal_blocks(contexts: Sequence[int], *, device: torch.device, seed: int = 0) -> tuple[torch.Tensor, int]:
    """(block tables [num_rows, max_blocks] int32, number of blocks): every row its own, dealt at random."""
    import torch

    counts = [-(-context // BLOCK_SIZE) for context in contexts]
    generator = torch.Generator().manual_seed(seed)
    blocks = 1 + torch.randperm(sum(counts), generator=generator)
    tables = torch.zeros(len(contexts), max(counts), dtype=torch.int32)
    first = 0
    for row, count in enumerate(counts):
        tables[row, :count] = blocks[first : first + count]
        first += count
    return tables.to(device), first + 1


def layer_cache(size: Sequence[int], dtype: torch.dtype, *, device: torch.device) -> Any:
    """One layer's KV with random content; in 8 bits with scales of one size."""
    import torch

    from graphllm.cache.kv_cache import LayerKV

    if dtype.itemsize > 1:
        return LayerKV(*(torch.randn(*size, dtype=dtype, device=device) for _ in range(2)))
    # Below the largest number of each 8-bit format, and NaN in none.
    stored = (torch.randint(96, tuple(size), dtype=torch.int8, device=device).view(dtype) for _ in range(2))
    scales = (torch.full(tuple(size[:3]), 1e-2, device=device) for _ in range(2))
    return LayerKV(*stored, *scales)


def kv_bytes(shape: ModelShape, contexts: Sequence[int]) -> int:
    """Bytes of one layer's keys and values in bfloat16."""
    return 2 * 2 * shape.num_kv_heads * shape.head_dim * sum(contexts)


def time_layers(
    shape: ModelShape, batches: Sequence[Sequence[int]], *, kv_dtype: torch.dtype | None = None
) -> list[float]:
    """Milliseconds of one layer's decode attention for each batch of contexts, all by the same graph.

    kv_dtype: bfloat16 unless told otherwise.
    """
    import torch

    from graphllm.arena import Arena
    from graphllm.attention.backend import AttentionBucket, AttentionSpec
    from graphllm.attention.triton_paged import TritonPagedAttention

    device = torch.device("cuda")
    num_rows = len(batches[0])
    max_context = max(map(max, batches))
    tables = [deal_blocks(contexts, device=device) for contexts in batches]
    num_layers = max(2, math.ceil(_MIN_BYTES / kv_bytes(shape, batches[0])))
    size = (max(blocks for _, blocks in tables), BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
    caches = [layer_cache(size, kv_dtype or torch.bfloat16, device=device) for _ in range(num_layers)]
    query = torch.randn(num_rows, shape.num_heads, shape.head_dim, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(query)
    backend = TritonPagedAttention(
        # The same for all batches, so that one kernel builds the work list of each.
        block_size=BLOCK_SIZE,
        arena=Arena(device),
        max_num_rows=max(BATCHES),
        max_model_len=max_context,
    )
    spec = AttentionSpec(shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.head_dim**-0.5)
    batch = empty_batch(num_rows, max_context, device=device)
    batch.hold(batches[0], tables[0][0])
    metadata = backend.plan(batch.inputs, AttentionBucket(num_rows, num_rows, num_rows))

    def layers() -> None:
        backend.begin_step(metadata)
        for cache in caches:
            backend.forward(query, layer_cache=cache, spec=spec, metadata=metadata, out=out)

    graph = captured(layers)
    times = []
    for contexts, (blocks, _) in zip(batches, tables, strict=True):
        batch.hold(contexts, blocks)
        torch.cuda.synchronize()
        times.append(time_on_device(graph.replay, repeats=3, groups=15).median / num_layers)
    return times


def measure(options: argparse.Namespace, log: ResultLog) -> None:
    ceilings = measure_ceilings()
    for name in SHAPES:
        for num_rows in BATCHES:
            metric = attention_metric(name, num_rows)
            with failing(log, metric, unit="of copy bandwidth"):
                shape, contexts = shape_of(name), [CONTEXT] * num_rows
                (milliseconds,) = time_layers(shape, [contexts])
                floor = 1e3 * kv_bytes(shape, contexts) / ceilings.bytes_per_second
                log.measured(
                    f"{name} batch {num_rows} context 4k: a layer",
                    1e3 * milliseconds,
                    unit="us",
                    floor=1e3 * floor,
                )
                log.measured(metric, floor / milliseconds, unit="of copy bandwidth", floor=1.0)
    with failing(log, RAGGED_METRIC, unit="times"):
        uniform, ragged = time_layers(shape_of("llama-3.1-8b"), [UNIFORM, RAGGED])
        log.measured(f"llama-3.1-8b 64 x {UNIFORM[0]}: a layer", 1e3 * uniform, unit="us")
        log.measured("llama-3.1-8b 16k + 63 x 512: a layer", 1e3 * ragged, unit="us")
        log.measured(RAGGED_METRIC, ragged / uniform, unit="times", floor=1.0)


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark("attention", measure, description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
