"""What our kernels need of Triton beyond its language: where they run, and what versions and cards differ in.

Owns the answer to "kernel or reference?", programmatic dependent launch, and the products that the
interpreter cannot do. Owns no operation.

A process either compiles kernels or interprets them: `TRITON_INTERPRET=1` must be set before triton is
imported, and from then on the launchers take their kernels for CPU tensors as well. Without it a CPU
tensor goes to the reference.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

# What compilers before 3.10 do by default and later ones will not; unset, 3.9 warns of it.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process interprets kernels, on CPU tensors."""

_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)
_FIRST_CAPABILITY_WITH_DEPENDENT_LAUNCH = (9, 0)
# Older versions cannot compile the wait for cards that have it.
_FIRST_TRITON_WITH_DEPENDENT_LAUNCH = (3, 6)


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether an operation on `tensor` is done by its Triton kernel; otherwise by its reference."""
    return tensor.is_cuda or INTERPRETED


def launch_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments for every launch of a kernel that has a `PDL` parameter.

    Programmatic dependent launch lets a kernel's prologue overlap its predecessor's end. It is on where
    the card has it (compute capability 9.0 and later), and `GRAPHLLM_PDL=0` switches it off.
    """
    if device.type == "cuda" and _has_dependent_launch(device.index):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@functools.cache
def _has_dependent_launch(device_index: int | None) -> bool:
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if os.environ.get("GRAPHLLM_PDL", "1") == "0" or version < _FIRST_TRITON_WITH_DEPENDENT_LAUNCH:
        return False
    return torch.cuda.get_device_capability(device_index) >= _FIRST_CAPABILITY_WITH_DEPENDENT_LAUNCH


@triton.jit
def wait_for_predecessor(PDL: tl.constexpr):
    """Wait until the kernels before this one have ended and their writes are visible.

    To be called once, on every path, before the first access to anything but weights, and never inside a
    loop: Triton's pipeliner may hoist loads above a wait that stands in a loop (triton#11905).
    """
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release_successor(PDL: tl.constexpr):
    """Let the next kernel begin its prologue. It still waits for this kernel's end before it reads."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def dot(a, b, accumulator):
    """accumulator + a @ b with float32 sums, on matrix units in the operands' own format.

    The interpreter multiplies bfloat16 and 8-bit floats wrongly, so there, and only there, operands are
    widened first. A widening that reached compiled code would halve its speed without a test failing, which
    is why the ahead-of-time tests look at the instructions.
    """
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    # float32 operands occur in tests only; tf32 would break their tolerances.
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def widen(x):
    """x in float32, exactly."""
    return x.to(tl.float32)
