"""What the card itself reaches: a large copy, and a large matrix product.

    python -m benchmarks.gpu.ceilings

Owns the two numbers that every floor is made of. Each benchmark measures them itself, because cards, clocks
and neighbours differ by more than most of what is compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.gpu.command import run_benchmark
from benchmarks.gpu.floors import Ceilings
from benchmarks.gpu.results import ResultLog
from benchmarks.gpu.timing import time_on_device

_COPY_ELEMENTS = 2**29  # bfloat16: 1 GiB, far more than any cache
_PRODUCT_SIZE = 8192


def measure_ceilings() -> Ceilings:
    """The best of a few short bursts, in about a quarter of a second. Needs 2.5 GiB of the card."""
    import torch

    source = torch.ones(_COPY_ELEMENTS, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copy = time_on_device(lambda: target.copy_(source), repeats=5, groups=10)
    num_bytes = 2 * source.numel() * source.element_size()
    # Real values: a card multiplies zeros or ones faster, because they cost it less power.
    left = torch.randn(_PRODUCT_SIZE, _PRODUCT_SIZE, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(_PRODUCT_SIZE, _PRODUCT_SIZE, device="cuda", dtype=torch.bfloat16)
    product = torch.empty_like(left)
    multiply = time_on_device(lambda: torch.mm(left, right.t(), out=product), repeats=5, groups=10)
    return Ceilings(num_bytes / copy.least * 1e3, 2 * _PRODUCT_SIZE**3 / multiply.least * 1e3)


def write_ceilings(log: ResultLog, ceilings: Ceilings) -> None:
    """The two lines."""
    log.measured("copy bandwidth, read and written", ceilings.bytes_per_second / 1e12, unit="TB/s")
    log.measured(f"bfloat16 product of {_PRODUCT_SIZE}^3", ceilings.flops_per_second / 1e12, unit="TFLOP/s")


def measure(options: argparse.Namespace, log: ResultLog) -> None:
    write_ceilings(log, measure_ceilings())


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark("ceilings", measure, description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
