"""Compiles a recorded launch for its card and reads what it would cost there.

Owns reading the compiler's output and the cache of what was read. Needs no card. The figures are the
assembler's (`ptxas -v`) and Triton's; matrix instructions are counted in the PTX.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.aot.recording import Launch

# The figures are cached under what they were made from, this file included.
_HOW = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

# mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32, wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16
_MATRIX = re.compile(r"\bmma(?:_async)?\.sync\.aligned\.(?:[\w:]+\.)*?m\d+n\d+k\d+\.([\w.]+)")
_NO_TYPES = {"row", "col", "satfinite"}
# tcgen05.mma.cta_group::1.kind::f16, where only a descriptor tells float16 from bfloat16. So with 8 bits.
_MATRIX_TCGEN05 = re.compile(r"\btcgen05\.mma\.[\w.:]*kind::(\w+)")
# %d = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<16x64xbf16> * tensor<64x32xbf16> -> tensor<16x32xf32>
_PRODUCT = re.compile(r"\btt\.dot(?:_scaled)? .*?: tensor<[\dx]+x(\w+)> \* tensor<[\dx]+x(\w+)>")
_KINDS_TCGEN05 = {"f16": {"bf16", "f16"}, "f8f6f4": {"e4m3", "e5m2"}, "i8": {"s8"}}
# The intermediate language's names beside those of the instructions.
_FORMATS = {"f8E4M3FN": "e4m3", "f8E5M2": "e5m2", "i8": "s8"}


@dataclass(frozen=True, slots=True)
class Row:
    """One compilation. Bytes are a thread's (stack, spills) and a program's (shared).

    `products` are the formats that the kernel's products multiply, `matrix` those that its matrix
    instructions do.
    """

    kernel: str
    configuration: str
    capability: int
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    products: tuple[str, ...]
    matrix: tuple[str, ...]
    is_serialized: bool

    @property
    def key(self) -> tuple[str, str, int]:
        return self.kernel, self.configuration, self.capability

    @classmethod
    def from_json(cls, text: str) -> Row:
        fields = json.loads(text)
        return cls(**{**fields, "products": tuple(fields["products"]), "matrix": tuple(fields["matrix"])})

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def measure(launch: Launch, cache: Path) -> Row:
    """The launch's row, from the cache where nothing that it is made from has changed."""
    source = ASTSource(launch.kernel, launch.signature, launch.constexprs, launch.attributes)
    made_from = (source.hash(), sorted(launch.options.items()), launch.capability, triton.__version__, _HOW)
    digest = hashlib.sha256(repr((launch.name, launch.configuration, made_from)).encode()).hexdigest()
    path = cache / f"{digest}.json"
    if path.exists():
        return Row.from_json(path.read_text(encoding="utf-8"))
    row = _compile(launch, source)
    cache.mkdir(parents=True, exist_ok=True)
    # Written aside first: several processes may share the folder.
    aside = path.with_suffix(f".{id(row)}.tmp")
    aside.write_text(row.to_json(), encoding="utf-8")
    aside.replace(path)
    return row


def _compile(launch: Launch, source: ASTSource) -> Row:
    log = io.StringIO()
    with (
        contextlib.redirect_stdout(log),
        knobs.nvidia.scope(),
        knobs.compilation.scope(),
    ):
        knobs.nvidia.dump_ptxas_log = True  # else the assembler's words are thrown away
        knobs.compilation.always_compile = True
        target = GPUTarget("cuda", launch.capability, 32)
        compiled = triton.compile(source, target=target, options=launch.options)
    words = log.getvalue()
    registers = [int(found) for found in re.findall(r"Used (\d+) registers", words)]
    assert registers, f"the assembler said nothing of {launch.name}:\n{words}"
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", words)
    return Row(
        kernel=launch.name,
        configuration=launch.configuration,
        capability=launch.capability,
        registers=max(registers),
        stack_bytes=max(int(found) for found in re.findall(r"(\d+) bytes stack frame", words)),
        spill_bytes=sum(int(found) for found in spills),
        shared_bytes=compiled.metadata.shared,
        products=(products := product_formats(compiled.asm["ttir"])),
        matrix=matrix_formats(compiled.asm["ptx"], products),
        is_serialized="wgmma.mma_async instructions are serialized" in words,
    )


def product_formats(ttir: str) -> tuple[str, ...]:
    """The formats of all products' operands in a kernel's first intermediate form, sorted."""
    operands = {operand for pair in _PRODUCT.findall(ttir) for operand in pair}
    return tuple(sorted(_FORMATS.get(operand, operand) for operand in operands))


def matrix_formats(ptx: str, products: tuple[str, ...]) -> tuple[str, ...]:
    """The formats that the matrix instructions multiply, sorted: "bf16", "e4m3", "tf32", ...

    Where an instruction leaves it to its descriptor, the kernel's products say which.
    """
    formats: set[str] = set()
    for types in _MATRIX.findall(ptx):
        # The accumulator's type comes first, then those of both operands.
        formats.update([name for name in types.split(".") if name not in _NO_TYPES][1:3])
    for kind in _MATRIX_TCGEN05.findall(ptx):
        formats.update(set(products) & _KINDS_TCGEN05.get(kind, set()) or {kind})
    return tuple(sorted(formats))
