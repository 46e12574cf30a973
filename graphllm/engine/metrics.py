"""What the engine counts, in Prometheus' text format.

Owns the registry and the names. The engine and the publisher call the observers; the server renders.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class EngineMetrics:
    """One engine's counters, gauges and histograms; latencies are in seconds."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry

        def counter(name: str, text: str) -> Counter:
            return Counter(f"graphllm_{name}", text, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"graphllm_{name}", text, registry=registry)

        def latency(name: str, text: str) -> Histogram:
            return Histogram(f"graphllm_{name}", text, buckets=_LATENCY_BUCKETS, registry=registry)

        self.model_info = Gauge(
            "graphllm_model_info",
            "Always 1; quantization is how weights are stored.",
            ["quantization"],
            registry=registry,
        )
        self.requests = counter("requests", "Requests admitted.")
        self.sequences_finished = Counter(
            "graphllm_sequences_finished",
            "Sequences ended: stop, length, abort (nobody waited any more) or error.",
            ["reason"],
            registry=registry,
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of admitted requests.")
        self.generated_tokens = counter("generated_tokens", "Tokens sampled for running sequences.")
        self.steps = counter("steps", "Device steps completed.")
        self.failed_steps = counter("failed_steps", "Device steps that failed.")
        self.graph_misses = counter(
            "graph_misses", "Steps run kernel by kernel because no captured graph was there for their size."
        )
        self.graphs_captured = gauge("graphs_captured", "CUDA graphs that are ready to be replayed.")
        self.graphs_wanted = gauge(
            "graphs_wanted", "CUDA graphs that traffic asked for, still to be captured."
        )
        self.graph_bytes = gauge("graph_bytes", "Device memory that captured graphs take.")
        self.capture_allocations = gauge(
            "capture_allocations", "Times that device memory was allocated inside a capture: should be 0."
        )
        self.kernel_compilations = counter(
            "kernel_compilations_on_loop", "Kernels compiled or loaded on the event loop while serving."
        )
        self.host_seconds = counter(
            "host_seconds", "Time that the event loop spent on steps: schedule, launch, apply, publish."
        )
        self.constrained_tokens = counter(
            "constrained_tokens", "Tokens sampled under a constraint: structured outputs, token lists, words."
        )
        self.mask_seconds = counter(
            "mask_seconds", "Time that the event loop spent on the masks of constrained rows."
        )
        self.preemptions = counter("preemptions", "Sequences preempted for want of KV blocks.")
        self.running = gauge("running_sequences", "Sequences that take part in steps.")
        self.waiting = gauge("waiting_sequences", "Sequences that wait for room.")
        self.blocks_total = gauge("kv_blocks_total", "KV blocks that can be held.")
        self.blocks_held = gauge("kv_blocks_held", "KV blocks held by sequences.")
        self.slots_held = gauge("slots_held", "Slots held by sequences.")
        self.time_to_first_token = latency("time_to_first_token_seconds", "Arrival to first token.")
        self.inter_token = latency("inter_token_seconds", "Between two tokens of a sequence.")
        self.request_seconds = latency("request_seconds", "Arrival to the request's end.")
        self.step_seconds = latency("step_seconds", "Device time of a step.")

    def include(self, collector: Collector) -> None:
        """Render somebody else's metrics with the engine's own, for example the HTTP server's."""
        self._registry.register(collector)

    def render(self) -> bytes:
        """The exposition text; its content type is CONTENT_TYPE."""
        return generate_latest(self._registry)
