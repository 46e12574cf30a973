"""KV memory on a card: how fast blocks go to host memory and back, and what 8 bits give attention.

    python -m benchmarks.gpu.swap

Swaps go through the server's own `BlockSwapper`, one transfer of many scattered blocks, timed by the events
of its copy stream. The yardstick is one large copy between pinned memory and the card, in the same run. Owns
no kernel.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence

from benchmarks.gpu.attention import CONTEXT, time_layers
from benchmarks.gpu.command import failing, run_benchmark
from benchmarks.gpu.floors import shape_of
from benchmarks.gpu.results import ResultLog
from benchmarks.gpu.targets import FP8_METRIC, swap_metric

SHAPE = "llama-3.1-8b"
BLOCK_SIZE = 16
NUM_BLOCKS = 1024
NUM_SWAPPED = 256  # half a GiB of the 8B's
ROUNDS = 7
_ATTENTION_ROWS = 64
_POLLING_SECONDS = 1e-4


def pinned_rates() -> dict[str, float]:
    """Bytes a second of one large copy "out" of the card and "in"."""
    import torch

    on_card = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    on_host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    rates = {}
    for direction, target, source in (("out", on_host, on_card), ("in", on_card, on_host)):
        times = []
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        rates[direction] = on_card.nbytes / min(times)
    return rates


def swap_rates() -> dict[str, float]:
    """Bytes a second of a transfer of `NUM_SWAPPED` scattered blocks, in each direction."""
    import torch

    from graphllm.batch import BlockTransfer, TransferDirection
    from graphllm.cache.kv_cache import KVCache, KVCacheShape
    from graphllm.cache.swap import BlockSwapper
    from graphllm.runner.cuda_device import CudaDevice

    shape = shape_of(SHAPE)
    device = CudaDevice()
    kv_shape = KVCacheShape(shape.num_layers, shape.num_kv_heads, shape.head_dim, BLOCK_SIZE, torch.bfloat16)
    kv_cache = KVCache(kv_shape, NUM_BLOCKS, device=device.torch_device)
    swapper = BlockSwapper(kv_cache, NUM_BLOCKS, device=device)
    torch.cuda.synchronize()
    generator = random.Random(0)
    seconds: dict[str, list[float]] = {"out": [], "in": []}
    for number in range(ROUNDS + 1):
        on_card = generator.sample(range(1, NUM_BLOCKS), NUM_SWAPPED)
        on_host = generator.sample(range(NUM_BLOCKS), NUM_SWAPPED)
        for direction, pairs in (
            (TransferDirection.OUT, zip(on_card, on_host, strict=True)),
            (TransferDirection.IN, zip(on_host, on_card, strict=True)),
        ):
            swapper.launch(BlockTransfer(number, direction, tuple(pairs)))
            while not (finished := swapper.poll()):
                time.sleep(_POLLING_SECONDS)
            if finished[0].error is not None:
                raise finished[0].error
            if number:  # the first compiles
                seconds["out" if direction is TransferDirection.OUT else "in"].append(finished[0].seconds)
    num_bytes = NUM_SWAPPED * swapper.bytes_per_block
    device.close()
    return {direction: num_bytes / statistics.median(times) for direction, times in seconds.items()}


def measure(options: argparse.Namespace, log: ResultLog) -> None:
    import torch

    pinned = pinned_rates()
    for direction, rate in pinned.items():
        log.measured(f"pinned copy {direction}", rate / 1e9, unit="GB/s")
    with failing(log, swap_metric("out"), unit="of the rate"):
        for direction, rate in swap_rates().items():
            log.measured(f"{SHAPE} swap {direction}", rate / 1e9, unit="GB/s")
            log.measured(swap_metric(direction), rate / pinned[direction], unit="of the rate", floor=1.0)
    with failing(log, FP8_METRIC, unit="times"):
        contexts = [[CONTEXT] * _ATTENTION_ROWS]
        (wide,) = time_layers(shape_of(SHAPE), contexts)
        (narrow,) = time_layers(shape_of(SHAPE), contexts, kv_dtype=torch.float8_e4m3fn)
        log.measured(FP8_METRIC, wide / narrow, unit="times")


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark("swap", measure, description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
