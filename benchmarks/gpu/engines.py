"""The engines that a run on a card loads: their limits, in one place, so that kernels can be compiled before.

Owns which limits each benchmark and each test on a card takes; `compile_kernels.py` goes through all of
them. A limit that stands elsewhere would have its kernels compiled while something is measured. Loads
nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.gpu.floors import SHAPES, shape_of

LARGE_SHAPE, SMALL_SHAPE, SMALLEST_SHAPE = SHAPES
CONTEXT = 1024
LONG_CONTEXT = 131072
BATCHES = (1, 8, 32, 64)
"""Rows of the decode steps that are measured."""
PROMPT = 8192
"""Tokens of the prompt whose prefill is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What compiled kernels depend on, by the names of `EngineConfig`; None is the engine's own choice.

    shape: the model's, of `SHAPES`.
    """

    shape: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int | None = None
    cudagraph_capture_sizes: tuple[int, ...] | None = None
    quantization: str | None = None

    def options(self) -> dict[str, Any]:
        """As arguments of `EngineConfig`."""
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        del fields["shape"]
        return fields

    def flags(self) -> list[str]:
        """As the server's command line."""
        flags = []
        for name, value in self.options().items():
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            flags += [f"--{name.replace('_', '-')}", text]
        return flags


def _decode(shape: str) -> EngineLimits:
    """One engine for short contexts and the longest; the large one with all the graphs of default limits."""
    longest = min(LONG_CONTEXT, shape_of(shape).max_context)
    if shape == LARGE_SHAPE:
        return EngineLimits(shape=shape, max_model_len=longest, max_num_seqs=max(BATCHES))
    return EngineLimits(
        shape=shape,
        max_model_len=longest,
        max_num_seqs=max(BATCHES),
        max_num_batched_tokens=max(BATCHES),
        cudagraph_capture_sizes=BATCHES,
    )


DECODE = {shape: _decode(shape) for shape in SHAPES}
QUANTIZED_BATCHES = (1, 8, 32)
"""Rows of the decode steps that are measured in several forms of weights."""
QUANTIZED = {
    form: EngineLimits(
        shape=LARGE_SHAPE,
        max_model_len=2 * CONTEXT,
        max_num_seqs=max(QUANTIZED_BATCHES),
        max_num_batched_tokens=max(QUANTIZED_BATCHES),
        cudagraph_capture_sizes=QUANTIZED_BATCHES,
        quantization=form if form in ("int4", "fp8") else None,
    )
    for form in ("bfloat16", "int4", "fp8")
}
PREFILL = EngineLimits(
    shape=LARGE_SHAPE,
    max_model_len=PROMPT + 64,
    max_num_seqs=8,
    max_num_batched_tokens=PROMPT,
    cudagraph_capture_sizes=(1,),
)
# Servers capture what their load uses: all sizes up to 256 would be 118 graphs.
SMALL_SERVER = EngineLimits(
    shape=SMALL_SHAPE, max_model_len=8192, max_num_seqs=256, cudagraph_capture_sizes=(1, 8, 64, 256)
)
LARGE_SERVER = EngineLimits(
    shape=LARGE_SHAPE, max_model_len=8192, max_num_seqs=64, cudagraph_capture_sizes=(1, 8, 64)
)
STARTUP = EngineLimits(shape=LARGE_SHAPE, max_model_len=8192, max_num_seqs=64)
GRAPH_TESTS = {
    shape: EngineLimits(
        shape=shape,
        max_model_len=4096,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        cudagraph_capture_sizes=(1, 2, 4, 8),
    )
    for shape in (SMALLEST_SHAPE, SMALL_SHAPE)
}
END_TO_END = EngineLimits(shape=SMALLEST_SHAPE, max_model_len=4096, max_num_seqs=32)

ENGINES: tuple[EngineLimits, ...] = (
    *DECODE.values(),
    *QUANTIZED.values(),
    PREFILL,
    SMALL_SERVER,
    LARGE_SERVER,
    STARTUP,
    *GRAPH_TESTS.values(),
    END_TO_END,
)


def engines_of(shape: str) -> list[EngineLimits]:
    """All that a run loads of a model."""
    return [limits for limits in ENGINES if limits.shape == shape]
