"""What a compiled kernel may not do.

Owns the rules and their exceptions, each with its reason; knows neither the kernels' launchers nor how
they are compiled.
"""

from __future__ import annotations

from tests.aot.compiling import Row
from tests.aot.recording import FIRST_CAPABILITY_WITH_E4M3

# Bytes of shared memory that a program can have. Triton does not refuse more.
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}

MATRIX_FORMATS = {"bf16", "e4m3", "s8"}
# Few rows of 8-bit floats, which not all cards' matrix units take: every one of them is a float16.
_WIDENED_FORMATS = {"f16"}


def complaints(row: Row) -> list[str]:
    """What is wrong with one compilation; empty when nothing."""
    found = []
    if row.spill_bytes:
        found.append(f"spills {row.spill_bytes} bytes a thread")
    elif row.stack_bytes:
        found.append(f"keeps {row.stack_bytes} bytes a thread in local memory")
    if row.shared_bytes > SHARED_MEMORY[row.capability]:
        found.append(f"wants {row.shared_bytes} bytes of shared memory, the card has less")
    if "tf32" in row.matrix or "f32" in row.products:
        found.append("multiplies widened operands")
    elif row.products and row.matrix != row.products:
        found.append(f"has products in {row.products} and matrix instructions in {row.matrix}")
    elif not _allowed_formats(row).issuperset(row.matrix):
        found.append(f"multiplies in {row.matrix}")
    if row.is_serialized:
        found.append("its asynchronous matrix instructions wait for one another")
    if "!" in row.configuration:
        found.append("is compiled again for each value of an integer: see do_not_specialize")
    if "fp8e4nv" in row.configuration and row.capability < FIRST_CAPABILITY_WITH_E4M3:
        found.append("uses e4m3 where the card has none")
    return [f"{row.kernel} ({row.configuration}) on cc {row.capability / 10}: {words}" for words in found]


def _allowed_formats(row: Row) -> set[str]:
    return MATRIX_FORMATS | (_WIDENED_FORMATS if "fp8e4nv" in row.configuration else set())
