"""GET /health, /ready, /metrics and /version: for load balancers, Prometheus and people."""

from __future__ import annotations

from collections.abc import Iterator

import orjson
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from graphllm import __version__
from graphllm.engine.engine import Engine, EngineState
from graphllm.engine.metrics import CONTENT_TYPE as METRICS_CONTENT_TYPE
from graphllm.errors import EngineUnavailableError
from graphllm.server.http import HttpCounters, Request, Response


class HealthRoutes:
    """Says what the engine says of itself; never touches the device."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def health(self, request: Request, response: Response) -> None:
        """Alive: 200 while the process is worth keeping (loading, ready, draining), 503 when it failed."""
        state = self._engine.state
        body = {"status": "ok" if state is EngineState.READY else state.value}
        status = 200
        if state in (EngineState.FAILED, EngineState.STOPPED):
            status, body["reason"] = 503, self._reason()
        response.send(status, orjson.dumps(body), content_type="application/json")

    def ready(self, request: Request, response: Response) -> None:
        """200 only while requests are admitted; otherwise 503 with the state and the reason."""
        state = self._engine.state
        if state is EngineState.READY:
            response.send(200, orjson.dumps({"status": "ready"}), content_type="application/json")
            return
        body = orjson.dumps({"status": state.value, "reason": self._reason()})
        response.send(503, body, content_type="application/json")

    def _reason(self) -> str:
        try:
            self._engine.check_ready()
        except EngineUnavailableError as error:
            return error.message
        return ""

    def metrics(self, request: Request, response: Response) -> None:
        response.send(200, self._engine.metrics.render(), content_type=METRICS_CONTENT_TYPE)

    def version(self, request: Request, response: Response) -> None:
        response.send(200, orjson.dumps({"version": __version__}), content_type="application/json")


class HttpCollector(Collector):
    """The HTTP server's own counters, read when somebody asks for the metrics."""

    def __init__(self, counters: HttpCounters) -> None:
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        counters = self._counters
        yield GaugeMetricFamily(
            "graphllm_http_connections_open", "Connections now open.", value=counters.connections_open
        )
        for name, text, value in (
            ("connections", "Connections accepted.", counters.connections_total),
            ("requests", "HTTP requests handed to a route.", counters.requests_total),
            ("refused", "Requests refused before any route saw them.", counters.refused_total),
            ("slow_clients", "Streams cut because the client did not read.", counters.slow_clients_total),
        ):
            yield CounterMetricFamily(f"graphllm_http_{name}", text, value=value)
