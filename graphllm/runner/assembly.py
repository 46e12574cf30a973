"""Puts the parts of a step together: attention backend, buffers, program, graphs, runner.

Owns which parts a device gets and in which order they can exist. Everything whose size does not depend on
the memory plan comes first (`StepParts`), so that the plan can be made from what it measures.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphllm.arena import Arena
from graphllm.attention.backend import AttentionBackend
from graphllm.attention.paged import PagedAttention
from graphllm.attention.triton_paged import TritonPagedAttention
from graphllm.cache.kv_cache import KVCache, KVCacheShape
from graphllm.config import EngineConfig
from graphllm.kernels.triton_support import INTERPRETED
from graphllm.layers.lora import AdapterMemory, TokenAdapters
from graphllm.models.adaptable import adaptable_layers
from graphllm.models.pooling import Pooler, PoolingConfig
from graphllm.models.served import ServedModel
from graphllm.models.transformers_fallback import FallbackDecoder
from graphllm.runner.device import Device
from graphllm.runner.graph_runner import GraphRunner
from graphllm.runner.memory_plan import StepLimits
from graphllm.runner.model_runner import ModelRunner
from graphllm.runner.sampler import SamplerKind
from graphllm.runner.staging import StagingRing
from graphllm.runner.step_buffers import StepBuffers
from graphllm.runner.step_program import StepProgram
from graphllm.runner.text_pooling import TextPooling
from graphllm.sampling_params import MAX_LOGPROBS
from graphllm.step_buckets import StepBuckets

# What captured graphs may take of a card together, whatever was measured of some: drivers grant memory in
# pieces, so that two graphs may seem to take none, or a whole piece each.
_LEAST_GRAPH_BYTES, _MOST_GRAPH_BYTES = 256 * 1024**2, 1024**3


@dataclass(frozen=True, slots=True)
class StepParts:
    """What a step needs beside a KV cache."""

    model: ServedModel
    pooling: TextPooling
    arena: Arena
    buffers: StepBuffers
    buckets: StepBuckets
    device: Device
    adapters: AdapterMemory | None = None

    def program(self, kv_cache: KVCache) -> StepProgram:
        return StepProgram(
            self.model,
            backend=self.model.backend,
            buffers=self.buffers,
            kv_cache=kv_cache,
            pooling=self.pooling,
            arena=self.arena,
            adapters=None if self.adapters is None else self.adapters.tokens,
        )

    def graphs(
        self, program: StepProgram, *, enabled: bool = True, max_bytes: int | None = None
    ) -> GraphRunner:
        return GraphRunner(
            program,
            self.buckets,
            max_num_seqs=self.buffers.max_num_seqs,
            device=self.device.graphs if enabled else None,
            max_bytes=max_bytes,
            is_foreign=isinstance(self.model, FallbackDecoder),
        )

    def new_runner(
        self,
        program: StepProgram,
        graphs: GraphRunner,
        *,
        limits: StepLimits,
        kv_cache: KVCache,
        eos_token_ids: frozenset[int],
    ) -> ModelRunner:
        staging = StagingRing(
            limits,
            max_num_seqs=self.buffers.max_num_seqs,
            padding_slot=self.buffers.padding_slot,
            pooling=self.pooling.config,
            device=self.device,
            num_groups=len(self.buffers.block_tables),
        )
        return ModelRunner(
            program,
            graphs,
            device=self.device,
            staging=staging,
            kv_cache=kv_cache,
            eos_token_ids=eos_token_ids,
        )


def choose_backend(
    config: EngineConfig, limits: StepLimits, device: Device, *, arena: Arena
) -> AttentionBackend:
    """Our kernels where they run, else the CPU's way."""
    if device.torch_device.type == "cuda" or INTERPRETED:
        return TritonPagedAttention(
            block_size=config.block_size,
            arena=arena,
            max_num_rows=config.max_num_seqs,
            max_model_len=limits.max_model_len,
        )
    return PagedAttention(block_size=config.block_size)


def assemble_step(
    config: EngineConfig,
    limits: StepLimits,
    device: Device,
    *,
    model: ServedModel,
    arena: Arena,
    pooler: Pooler | None = None,
) -> StepParts:
    """Build the parts around a model; `arena` is that of the model's attention backend.

    pooler: None for one that gives a text's last hidden state as it is.
    """
    if pooler is None:
        last_states = PoolingConfig(purpose="generate", method="last", hidden_size=model.config.hidden_size)
        pooler = Pooler(last_states, device=device.torch_device)
    buffers = StepBuffers(
        limits,
        max_num_seqs=config.max_num_seqs,
        vocab_size=model.config.vocab_size,
        device=device.torch_device,
        num_groups=model.config.kv_groups(max_model_len=limits.max_model_len).num_groups,
    )
    adapters = None
    if config.serves_lora:
        adapters = AdapterMemory(
            adaptable_layers(model),
            max_loras=config.max_loras,
            max_rank=config.max_lora_rank,
            dtype=model.dtype,
            tokens=TokenAdapters(buffers.token_adapters, arena),
        )
    return StepParts(
        model=model,
        pooling=TextPooling(pooler, num_slots=limits.num_slots + 1, device=device.torch_device),
        arena=arena,
        buffers=buffers,
        buckets=StepBuckets.choose(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            decode_sizes=config.cudagraph_capture_sizes,
        ),
        device=device,
        adapters=adapters,
    )


@dataclass(frozen=True, slots=True)
class LargestStep:
    """Measured on a card, in bytes. free_bytes: with tables and arena there, before any graph."""

    free_bytes: int
    graph_bytes: int


def measure_largest_step(parts: StepParts, kv_shape: KVCacheShape, *, graphs_enabled: bool) -> LargestStep:
    """Run the largest steps over a cache of no use, which fixes the arena, and capture two of them.

    graph_bytes is twice what all graphs of steady traffic would take at the price of those, within bounds:
    when it is used up, the rest stays eager.
    """
    assert parts.device.graphs is not None, "a card captures graphs"
    kv_cache = KVCache(kv_shape, 2, device=parts.device.torch_device)
    program = parts.program(kv_cache)
    graphs = parts.graphs(program)
    run_largest_steps(program, graphs, max_num_batched_tokens=parts.buckets.token_sizes[-1])
    parts.arena.seal()
    parts.device.graphs.trim()
    free_bytes = parts.device.graphs.free_bytes()
    if not graphs_enabled:
        return LargestStep(free_bytes, 0)
    graph_bytes = max(2 * graphs.measure_bytes(), _LEAST_GRAPH_BYTES)
    return LargestStep(free_bytes, min(graph_bytes, _MOST_GRAPH_BYTES))


def run_largest_steps(program: StepProgram, graphs: GraphRunner, *, max_num_batched_tokens: int) -> None:
    """Run the largest steps on padding alone, with every sampler: the arena is then as large as it gets."""
    num_seqs = program.buffers.max_num_seqs
    for shape in (graphs.mixed_shape(max_num_batched_tokens), graphs.decode_shape(num_seqs)):
        for with_adapters in program.adapter_kinds:
            program.forward(shape, with_adapters=with_adapters)
    program.pool_largest(num_tokens=max_num_batched_tokens, num_lines=num_seqs)
    program.score(1, num_tokens=max_num_batched_tokens, num_top=MAX_LOGPROBS)
    for kind in SamplerKind:
        program.sample(num_seqs, kind)
    for kind in (SamplerKind.GENERAL, SamplerKind.LOGPROBS):
        for masked in (False, True):
            program.sample_subset(num_seqs, kind, masked=masked)
