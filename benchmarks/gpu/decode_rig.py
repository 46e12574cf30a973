"""An engine without its loop: sequences of any context that decode, or prompts that are computed, at once.

Owns building steps by hand. Contexts need no prefill: their slots are installed as if they had been computed,
over a KV pool of random keys and values, which cost as much to read as real ones. Measures nothing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from benchmarks.gpu.engines import EngineLimits
from benchmarks.gpu.floors import shape_of, shape_path

_STEP_TIMEOUT = 60.0  # seconds


def engine_config(model: str, *, num_kv_tokens: int, bytes_per_token: int, **options: Any) -> Any:
    """An EngineConfig for a card, with room for so many tokens of KV and spare blocks.

    model: a shape's name (random weights), or a folder with weights. bytes_per_token: of KV, over all layers.
    """
    from graphllm.config import EngineConfig

    path = shape_path(model)
    fields: dict[str, Any] = {
        "model": str(path) if path.exists() else model,
        "load_format": "dummy" if path.exists() else "auto",
        "device": "cuda",
        "dtype": "bfloat16",
        "kv_cache_memory_bytes": (num_kv_tokens + 4096) * bytes_per_token,
        # Nothing is preempted here, and to pin the default takes a second or two.
        "swap_space": 0.0,
    }
    return EngineConfig(**{**fields, **options})


def limited_config(limits: EngineLimits, *, num_kv_tokens: int) -> Any:
    """An EngineConfig of random weights in bfloat16 within these limits."""
    return engine_config(
        limits.shape,
        num_kv_tokens=num_kv_tokens,
        bytes_per_token=2 * shape_of(limits.shape).num_kv_elements,
        **limits.options(),
    )


@contextmanager
def open_engine(config: Any) -> Iterator[tuple[Any, Any]]:
    """(LoadedModel, Device) of a configuration, ready to launch steps; closed in order at the end.

    Says which kernels were compiled meanwhile: in a whole run of `make gpu` there should be none.
    """
    from graphllm.engine.loading import load
    from graphllm.runner.compilation import CompilationWatch
    from graphllm.runner.device import open_device

    watch = CompilationWatch(_say_compiled)
    watch.start()
    device = open_device(config.device)
    try:
        with nullcontext() if device.graphs is None else device.graphs.on_stream():
            loaded = load(config, device, show_progress=False)
        try:
            yield loaded, device
        finally:
            loaded.runner.graphs.close()
    finally:
        device.close()
        watch.stop()


def _say_compiled(kernel: str, seconds: float) -> None:
    print(f"compiled only now: {kernel}, {seconds:.1f} s", flush=True)


def fill_kv(runner: Any) -> None:
    """Random keys and values everywhere but in the null block, which stays zero."""
    for layer in runner.kv_cache.layers:
        for pool in (layer.key, layer.value):
            pool.normal_()
            pool[0].zero_()


class Rows:
    """Sequences in slots 0, 1, ..., each with its own blocks, that steps are built of.

    contexts: how many tokens each holds, the one that the first decode step computes included. Blocks are
    dealt out at random, as they are after a while of serving. One spare block each lets them decode on.
    params: how tokens are sampled, greedily unless told otherwise.
    """

    def __init__(self, loaded: Any, contexts: Sequence[int], *, seed: int = 0, params: Any = None) -> None:
        from graphllm.sampling_params import SamplingParams
        from graphllm.sequence import SequenceGroup

        self.loaded = loaded
        self.runner = loaded.runner
        self._next_step_id = 1
        draw = random.Random(seed)
        block_size = loaded.plan.block_size
        blocks = list(range(1, loaded.plan.num_blocks))
        draw.shuffle(blocks)
        params = params or SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=1_000_000)
        self.sequences = []
        for index, context in enumerate(contexts):
            tokens = [draw.randrange(loaded.vocab_size) for _ in range(context)]
            group = SequenceGroup(
                f"rows-{index}", tokens, params=params, seed=index, max_total_tokens=loaded.plan.max_model_len
            )
            sequence = group.sequences[0]
            # In every group of layers, those with windows too: nothing is released here.
            num_columns = min(-(-context // block_size) + 1, loaded.plan.max_blocks_per_sequence)
            num_blocks = num_columns * loaded.scheduler.block_manager.layout.num_groups
            if num_blocks > len(blocks):
                raise ValueError(
                    f"{len(contexts)} contexts of up to {max(contexts)} do not fit in the KV pool"
                )
            sequence.block_table = [blocks.pop() for _ in range(num_blocks)]
            sequence.slot = index
            self.sequences.append(sequence)

    def install(self, num_computed_tokens: Sequence[int]) -> list[Any]:
        """Make every slot hold its sequence with so many tokens computed, and compute the rest in one step.

        Gives the step's token ids, one a row.
        """
        from graphllm.batch import SlotInstall

        installs = [
            SlotInstall(sequence, index, computed)
            for index, (sequence, computed) in enumerate(
                zip(self.sequences, num_computed_tokens, strict=True)
            )
        ]
        lens = [
            len(sequence.token_ids) - computed
            for sequence, computed in zip(self.sequences, num_computed_tokens, strict=True)
        ]
        return self.finish(self.launch(lens, installs))

    def install_decode(self) -> list[Any]:
        """All of the context is computed but its last token."""
        return self.install([len(sequence.token_ids) - 1 for sequence in self.sequences])

    def decode(self) -> list[Any]:
        """One more step of one token each. Gives its token ids."""
        return self.finish(self.launch([1] * len(self.sequences), []))

    def launch(self, lens: Sequence[int], installs: Sequence[Any], *, sampled: bool = True) -> Any:
        """Launch a step of `lens[i]` tokens of sequence i; gives its handle."""
        from graphllm.batch import SamplePair, ScheduledBatch, ScheduledRow

        batch = ScheduledBatch(
            step_id=self._next_step_id,
            rows=[ScheduledRow(sequence, i, lens[i]) for i, sequence in enumerate(self.sequences)],
            num_decode_rows=sum(n == 1 for n in lens),
            pairs=[SamplePair(i, sequence, i, 0) for i, sequence in enumerate(self.sequences)]
            if sampled
            else [],
            installs=list(installs),
        )
        self._next_step_id += 1
        return self.runner.launch(batch)

    def finish(self, handle: Any) -> list[Any]:
        """Wait for a step; its token ids. Raises TimeoutError, or what the step raised."""
        deadline = time.monotonic() + _STEP_TIMEOUT
        while not handle.ready():
            if time.monotonic() > deadline:
                raise TimeoutError(f"a step was not ready after {_STEP_TIMEOUT:g} s")
        token_ids: list[Any] = handle.result().token_ids
        return token_ids
