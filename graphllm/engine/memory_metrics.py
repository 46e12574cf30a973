"""KV memory in numbers: the prefix cache, the host tier, what went where.

Owns the names. The numbers are the scheduler's and the swapper's own, read when somebody asks for the
metrics, so that a step costs nothing for them.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from graphllm.cache.swap import BlockSwapper
from graphllm.scheduler.scheduler import Scheduler


class MemoryCollector(Collector):
    """One engine's KV memory."""

    def __init__(self, scheduler: Scheduler, swapper: BlockSwapper) -> None:
        self._scheduler = scheduler
        self._swapper = swapper

    def collect(self) -> Iterator[Metric]:
        for name, text, count in self._counters():
            yield CounterMetricFamily(f"graphllm_{name}", text, value=count)
        for name, text, value in self._gauges():
            yield GaugeMetricFamily(f"graphllm_{name}", text, value=value)

    def _counters(self) -> Iterator[tuple[str, str, int]]:
        counters, swapper = self._scheduler.counters, self._swapper
        yield "prefix_cache_queries", "Prompt tokens looked up.", counters.num_prefix_queries_tokens
        yield "prefix_cache_hits", "Prompt tokens found, and not computed.", counters.num_prefix_hit_tokens
        yield "swap_out_blocks", "KV blocks of sequences sent to the host.", counters.num_swapped_out_blocks
        yield "swap_in_blocks", "KV blocks of sequences that came back.", counters.num_swapped_in_blocks
        yield "swap_out_bytes", "Bytes copied to host memory, for whatever reason.", swapper.num_bytes_out
        yield "swap_in_bytes", "Bytes copied from host memory, for whatever reason.", swapper.num_bytes_in
        yield "failed_transfers", "Copies between the tiers that failed.", swapper.num_failed
        yield "recomputed_sequences", "Preempted sequences computed again.", counters.num_recomputed
        yield "offloaded_blocks", "Cached KV blocks copied to host memory.", counters.num_offloaded_blocks
        yield "fetched_blocks", "Cached KV blocks copied back for a prompt.", counters.num_fetched_blocks
        yield (
            "evicted_blocks",
            "Cached KV blocks whose content was dropped from the device.",
            self._scheduler.block_manager.num_evicted_blocks,
        )
        yield (
            "window_released_blocks",
            "KV blocks that a running sequence gave back because no window of theirs shows them any more.",
            self._scheduler.block_manager.num_passed_blocks,
        )

    def _gauges(self) -> Iterator[tuple[str, str, float]]:
        scheduler = self._scheduler
        host = scheduler.host_tier
        yield (
            "kv_blocks_cached",
            "Blocks that nobody holds and whose content is kept.",
            (scheduler.block_manager.num_cached_blocks),
        )
        yield "kv_blocks_pinned", "Blocks held by pinned prefixes.", scheduler.num_pinned_blocks
        yield "kv_unused_share", "Share of held KV positions that hold no token.", scheduler.unused_share
        yield "swapped_sequences", "Sequences in host memory, or on their way.", len(scheduler.moved)
        yield "host_blocks_total", "KV blocks of host memory.", host.num_blocks
        yield "host_blocks_held", "Blocks of host memory that swaps and copies hold.", host.num_held_blocks
        yield "host_blocks_cached", "Blocks of host memory with cached prefixes.", host.num_cached_blocks
