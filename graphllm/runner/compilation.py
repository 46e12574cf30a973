"""When kernels are compiled: ahead, in helper processes, and never unnoticed on the event loop.

A kernel's first compilation takes seconds, in which every stream would stand still. So before a model's
steps are first run on a card, helper processes run the same steps with one layer of random weights, which
leaves every kernel in Triton's cache on disk. Owns the helpers and the watch that reports what was compiled
in spite of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs

from graphllm.arena import Arena
from graphllm.cache.kv_cache import KVCache, resolve_kv_dtype
from graphllm.config import EngineConfig
from graphllm.kernels.linear_choice import table_path
from graphllm.kernels.skinny_linear import prefetches_weights
from graphllm.kernels.triton_support import launch_options
from graphllm.models.checkpoint import Checkpoint, open_model, resolve_model
from graphllm.models.config import resolve_dtype
from graphllm.models.decoder import Decoder
from graphllm.models.dummy import DummyCheckpoint, fill_random
from graphllm.models.quantization import read_quantization
from graphllm.models.registry import find_family, read_model_config
from graphllm.models.weights import choose_product
from graphllm.runner.assembly import StepParts, assemble_step, choose_backend
from graphllm.runner.device import Device, open_device
from graphllm.runner.graph_runner import GraphRunner
from graphllm.runner.memory_plan import plan_limits
from graphllm.runner.sampler import SamplerKind
from graphllm.runner.step_program import StepProgram
from graphllm.sampling_params import MAX_LOGPROBS

logger = logging.getLogger(__name__)

SHARES = ("decode", "mixed", "sampler")
_PACKAGE = Path(__file__).resolve().parents[1]
_FIELDS_THAT_KERNELS_SEE = (
    "dtype",
    "kv_cache_dtype",
    "block_size",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "cudagraph_capture_sizes",
    "serves_lora",
    "max_loras",
    "max_lora_rank",
)


class CompilationWatch:
    """Calls `on_compiled(kernel name, seconds)` for each kernel that Triton compiles in this process.

    What comes ready from the cache on disk is not reported: it takes a millisecond.
    """

    def __init__(self, on_compiled: Callable[[str, float], None]) -> None:
        self._on_compiled = on_compiled
        self._previous: Any = None

    def start(self) -> None:
        self._previous = knobs.compilation.listener
        knobs.compilation.listener = self._listen

    def stop(self) -> None:
        if knobs.compilation.listener == self._listen:
            knobs.compilation.listener = self._previous

    def _listen(self, *, metadata: dict[str, Any], times: Any, cache_hit: bool, **rest: Any) -> None:
        if not cache_hit:
            self._on_compiled(str(metadata.get("name")), times.total / 1e6)
        if self._previous is not None:
            self._previous(metadata=metadata, times=times, cache_hit=cache_hit, **rest)


class AheadCompilation:
    """Helper processes that compile what `config` will need, unless that was done before.

    To be used as a context manager around the reading of weights: whatever happens there, no helper stays.
    `GRAPHLLM_COMPILE_AHEAD=0` starts none, for runs that know that everything was compiled.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._marker = Path(knobs.cache.dir) / f"graphllm-{_fingerprint(config)}.compiled"
        self._started = time.perf_counter()
        self._helpers: list[subprocess.Popen[bytes]] = []
        if self._marker.exists() or os.environ.get("GRAPHLLM_COMPILE_AHEAD") == "0":
            return
        logger.info("compiling kernels for %s (once for this model and card)", config.model)
        command = [sys.executable, "-m", __name__, json.dumps(dataclasses.asdict(config))]
        # A session of their own: Ctrl-C is the server's to answer.
        self._helpers = [
            subprocess.Popen([*command, share], stdin=subprocess.DEVNULL, start_new_session=True)
            for share in SHARES
        ]

    def __enter__(self) -> AheadCompilation:
        return self

    def __exit__(self, *error: object) -> None:
        for helper in self._helpers:
            if helper.poll() is None:
                helper.kill()
            helper.wait()

    def wait(self) -> None:
        """Until all are done. A helper that fails costs time later and nothing else."""
        codes = [helper.wait() for helper in self._helpers]
        if any(codes):
            logger.warning("kernels could not all be compiled ahead: they will be when first used")
        elif codes:
            logger.info("kernels compiled in %.1f s", time.perf_counter() - self._started)
            self._marker.parent.mkdir(parents=True, exist_ok=True)
            self._marker.touch()


def _fingerprint(config: EngineConfig) -> str:
    """What the compiled kernels depend on: their sources, the model's and the steps' shapes, the card, the
    versions, and the switches in the environment."""
    digest = hashlib.sha256()
    sources = [*_PACKAGE.glob("kernels/*.py"), *_PACKAGE.glob("attention/*.py")]
    for path in (*sorted(sources), table_path()):
        digest.update(path.read_bytes())
    card = torch.device("cuda", torch.cuda.current_device())
    checkpoint = _checkpoint(config)
    shapes = {name: getattr(config, name) for name in _FIELDS_THAT_KERNELS_SEE}
    what = (
        triton.__version__,
        torch.__version__,
        torch.cuda.get_device_name(card),
        launch_options(card),
        prefetches_weights(),
        read_model_config(checkpoint, find_family(checkpoint)),
        read_quantization(checkpoint, asked=config.quantization).description,
        shapes,
    )
    digest.update(repr(what).encode())
    return digest.hexdigest()[:32]


def _checkpoint(config: EngineConfig) -> Checkpoint | DummyCheckpoint:
    return open_model(resolve_model(config), config.load_format)


def run_share(config: EngineConfig, share: str, device: Device) -> None:
    """Run the steps of one share, on padding alone, with random weights and one layer of each kind."""
    checkpoint = _checkpoint(config)
    family = find_family(checkpoint)
    model_config = read_model_config(checkpoint, family)
    quantization = read_quantization(checkpoint, asked=config.quantization)
    tensors = (
        None if isinstance(checkpoint, DummyCheckpoint) else quantization.source(checkpoint).tensor_names()
    )
    torch_device = device.torch_device
    dtype = resolve_dtype(config.dtype, model_config.dtype, device_type=torch_device.type)
    limits = plan_limits(
        config, model_context=model_config.max_position_embeddings, device_type=torch_device.type
    )
    model_config = model_config.one_layer_of_each_kind()
    arena = Arena(torch_device)
    product = choose_product(model_config, device=torch_device, dtype=dtype)
    model = Decoder(
        model_config,
        backend=choose_backend(config, limits, device, arena=arena),
        schemes=quantization.schemes(model_config, product, tensors=tensors),
        device=torch_device,
        dtype=dtype,
    )
    fill_random(model, seed=0)
    parts = assemble_step(config, limits, device, model=model, arena=arena)
    kv_shape = model_config.kv_cache_shape(
        block_size=config.block_size,
        max_model_len=limits.max_model_len,
        dtype=resolve_kv_dtype(config.kv_cache_dtype, dtype),
    )
    program = parts.program(KVCache(kv_shape, 2, device=torch_device))
    graphs = parts.graphs(program)
    _SHARE_RUNNERS[share](parts, program, graphs)


def _run_decode(parts: StepParts, program: StepProgram, graphs: GraphRunner) -> None:
    for size in parts.buckets.decode_sizes:
        for with_adapters in program.adapter_kinds:
            program.forward(graphs.decode_shape(size), with_adapters=with_adapters)
        program.sample(size, SamplerKind.GREEDY)


def _run_mixed(parts: StepParts, program: StepProgram, graphs: GraphRunner) -> None:
    for size in parts.buckets.token_sizes:
        for with_adapters in program.adapter_kinds:
            program.forward(graphs.mixed_shape(size), with_adapters=with_adapters)


def _run_samplers(parts: StepParts, program: StepProgram, graphs: GraphRunner) -> None:
    for size in parts.buckets.decode_sizes:
        for kind in (SamplerKind.GENERAL, SamplerKind.LOGPROBS):
            program.sample(size, kind)
            for masked in (False, True):
                program.sample_subset(size, kind, masked=masked)
    program.score(1, num_tokens=parts.buckets.token_sizes[-1], num_top=MAX_LOGPROBS)


_SHARE_RUNNERS = {"decode": _run_decode, "mixed": _run_mixed, "sampler": _run_samplers}


def main() -> int:
    """Compile one share of a configuration's kernels; what `AheadCompilation` starts."""
    parser = argparse.ArgumentParser(description="Compile a share of a model's kernels.")
    parser.add_argument("config", type=json.loads)
    parser.add_argument("share", choices=SHARES)
    arguments = parser.parse_args()
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in arguments.config.items()
    }
    device = open_device("cuda")
    work = device.submit(lambda: run_share(EngineConfig(**values), arguments.share, device))
    device.close()
    while not work.query():
        pass
    if work.error is not None:
        raise work.error
    return 0


if __name__ == "__main__":
    sys.exit(main())
