"""The serving process: listens, loads, serves, drains.

Owns the order of start-up and shutdown, the route table, the API key and what the process returns
to the shell. It listens before it loads, so that /health can say why the server is not ready yet and
a taken port is found at once.

Exit codes: 0 after Ctrl-C or SIGTERM, 1 when the engine has failed, 130 when a second Ctrl-C cut
running requests short. What cannot start raises StartupError, which the command line turns into its
own code.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import signal
import sys

import msgspec
import uvloop

from graphllm import __version__
from graphllm.config import EngineConfig, ServerConfig
from graphllm.engine.engine import Engine
from graphllm.errors import AuthenticationError, GraphLLMError, StartupError
from graphllm.log import configure_logging
from graphllm.server.admin.adapters import AdapterRoutes, LoadRequest, UnloadRequest
from graphllm.server.admin.prefixes import PinRequest, PrefixRoutes
from graphllm.server.anthropic.errors import is_anthropic, speak_anthropic
from graphllm.server.anthropic.protocol import CountTokensRequest, MessagesRequest
from graphllm.server.anthropic.routes import Messages
from graphllm.server.error_responses import send_error
from graphllm.server.generation.served_model import ServedModel
from graphllm.server.health import HealthRoutes, HttpCollector
from graphllm.server.http import HttpLimits, HttpServer, Request, Response
from graphllm.server.openai.chat_completions import ChatCompletions
from graphllm.server.openai.chat_protocol import ChatCompletionRequest
from graphllm.server.openai.classification import Classification, ClassifyRequest
from graphllm.server.openai.completion_protocol import CompletionRequest
from graphllm.server.openai.completions import Completions
from graphllm.server.openai.embeddings import EmbeddingRequest, Embeddings
from graphllm.server.openai.models import ModelRoutes
from graphllm.server.openai.rerank import Reranking, RerankRequest
from graphllm.server.openai.responses.create import CreateResponse
from graphllm.server.openai.responses.protocol import ResponsesRequest
from graphllm.server.openai.responses.routes import StoredResponses
from graphllm.server.openai.responses.store import ResponseStore, StoreLimits
from graphllm.server.openai.scores import ScoreRequest, Scores
from graphllm.server.openai.tokenization import DetokenizeRequest, Tokenization, TokenizeRequest
from graphllm.server.openapi import ApiRoute, OpenApiRoute
from graphllm.server.response import Handler
from graphllm.server.router import Router

logger = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CUT = 130
# How long a failed process stays up to say so on /health.
FAILURE_LINGER_SECONDS = 2.0
# How long last answers may take to reach their clients after the engine has stopped.
FLUSH_SECONDS = 2.0
_KEY_ROUTES = (
    "/v1/",
    "/v2/",
    "/admin/",
    "/tokenize",
    "/detokenize",
    "/score",
    "/rerank",
    "/classify",
)


def serve(engine_config: EngineConfig, server_config: ServerConfig) -> int:
    """Serve until a signal or a failure; returns the process' exit code.

    Raises StartupError when serving cannot begin; the message is one line for the user.
    """
    configure_logging(server_config.log_level)
    return uvloop.run(ServingProcess(engine_config, server_config).run())


class Application:
    """Answers every request: the route table, the API key, errors."""

    def __init__(self, engine: Engine, config: ServerConfig, *, model_name: str) -> None:
        self.served = ServedModel(
            engine,
            model_name,
            tool_call_parser=config.tool_call_parser,
            reasoning_parser=config.reasoning_parser,
            lenient=config.lenient,
        )
        self._api_key = None if config.api_key is None else config.api_key.encode()
        routes = [*self._plain_routes(engine), *self._generating_routes(config), *self._scoring_routes()]
        document = OpenApiRoute(routes, needs_key=self._api_key is not None)
        routes.append(ApiRoute("GET", "/openapi.json", document.get, "This document."))
        self._router = Router()
        for route in routes:
            self._router.add(route.method, route.pattern, route.handler)

    def _plain_routes(self, engine: Engine) -> list[ApiRoute]:
        """What the server says of itself and of the model's tokens, and the operator's routes."""
        health, models = HealthRoutes(engine), ModelRoutes(self.served)
        prefixes, tokenization = PrefixRoutes(engine), Tokenization(self.served)
        adapters, one_prefix = AdapterRoutes(engine), "/admin/prefixes/{id:path}"
        load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
        return [
            ApiRoute("GET", "/health", health.health, "Whether the process is alive."),
            ApiRoute("GET", "/ready", health.ready, "Whether requests are admitted."),
            ApiRoute("GET", "/metrics", health.metrics, "Counters and gauges for Prometheus."),
            ApiRoute("GET", "/version", health.version, "The server's version."),
            ApiRoute("GET", "/v1/models", models.list, "The model that is served."),
            ApiRoute("GET", "/v1/models/{name:path}", models.retrieve, "One model by its id."),
            ApiRoute("POST", "/tokenize", tokenization.tokenize, "Text to token ids.", TokenizeRequest),
            ApiRoute("POST", "/detokenize", tokenization.detokenize, "Token ids to text.", DetokenizeRequest),
            ApiRoute("GET", "/admin/prefixes", prefixes.list_pinned, "Prefixes that stay in the KV cache."),
            ApiRoute("POST", "/admin/prefixes", prefixes.pin, "Compute a prefix and keep it.", PinRequest),
            ApiRoute("DELETE", one_prefix, prefixes.unpin, "Let a prefix go."),
            ApiRoute("POST", load, adapters.load, "Load a LoRA adapter.", LoadRequest),
            ApiRoute("POST", unload, adapters.unload, "Take a LoRA adapter's name away.", UnloadRequest),
        ]

    def _generating_routes(self, config: ServerConfig) -> list[ApiRoute]:
        """The APIs that use the model."""
        served = self.served
        store = ResponseStore(
            StoreLimits(
                max_responses=config.max_stored_responses,
                max_bytes=config.response_store_size,
                max_age=config.response_ttl,
            )
        )
        chats, completions = ChatCompletions(served).create, Completions(served).create
        create_response, stored = CreateResponse(served, store).create, StoredResponses(store)
        messages, embeddings = Messages(served), Embeddings(served).create
        count, one_response = messages.count_tokens, "/v1/responses/{id}"
        return [
            _generating(
                "/v1/chat/completions", chats, "The assistant's next message.", ChatCompletionRequest
            ),
            _generating("/v1/completions", completions, "Continue texts.", CompletionRequest),
            _generating("/v1/responses", create_response, "A response, which is stored.", ResponsesRequest),
            ApiRoute("GET", one_response, stored.retrieve, "A stored response, or its events again."),
            ApiRoute("GET", f"{one_response}/input_items", stored.list_input, "A response's input."),
            ApiRoute("POST", f"{one_response}/cancel", stored.cancel, "Cancel a background response."),
            ApiRoute("DELETE", one_response, stored.delete, "Delete a response."),
            _generating("/v1/messages", messages.create, "Continue a chat.", MessagesRequest),
            ApiRoute("POST", "/v1/messages/count_tokens", count, "How long a prompt is.", CountTokensRequest),
            ApiRoute("POST", "/v1/embeddings", embeddings, "A vector for each input.", EmbeddingRequest),
        ]

    def _scoring_routes(self) -> list[ApiRoute]:
        """The APIs of models for scores, each under the paths that its clients know."""
        scores, reranking = Scores(self.served).create, Reranking(self.served).create
        classification = Classification(self.served).create
        return [
            *(
                ApiRoute("POST", path, scores, "How well texts go together.", ScoreRequest)
                for path in ("/v1/score", "/score")
            ),
            *(
                ApiRoute("POST", path, reranking, "Documents, the best first.", RerankRequest)
                for path in ("/v1/rerank", "/v2/rerank", "/rerank")
            ),
            *(
                ApiRoute("POST", path, classification, "A label for each input.", ClassifyRequest)
                for path in ("/v1/classify", "/classify")
            ),
        ]

    def handle(self, request: Request, response: Response) -> None:
        """Answer, or begin to. Other exceptions than these are answered by the connection, as a 500."""
        if is_anthropic(request.path):
            speak_anthropic(response)
        try:
            self._authorize(request)
            self._router(request, response)
        except GraphLLMError as error:
            send_error(response, error)

    def _authorize(self, request: Request) -> None:
        if self._api_key is None or not request.path.startswith(_KEY_ROUTES):
            return
        scheme, _, token = (request.headers.get("authorization") or "").partition(" ")
        given = (token if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")).strip()
        # Compared in constant time, so that the time of a refusal tells nothing of the key.
        if not hmac.compare_digest(given.encode(), self._api_key):
            raise AuthenticationError(
                "A valid API key is needed: send 'Authorization: Bearer <key>' or 'x-api-key: <key>'."
            )


def _generating(pattern: str, handler: Handler, summary: str, body: type[msgspec.Struct]) -> ApiRoute:
    return ApiRoute("POST", pattern, handler, summary, body, is_streamed=True)


class ServingProcess:
    """One engine behind one HTTP server, from the first listen to the exit code."""

    def __init__(self, engine_config: EngineConfig, server_config: ServerConfig) -> None:
        self._engine_config = engine_config
        self._config = server_config

    async def run(self) -> int:
        """Raises StartupError when serving cannot begin."""
        self._interrupted = asyncio.Event()
        self._interrupted_again = asyncio.Event()
        self._failed = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._note_signal)
        self.engine = engine = Engine(self._engine_config, manage_gc=True)
        engine.on_failure = self._failed.set
        engine.base_name = name = self._config.served_model_name or self._engine_config.model
        if self._config.api_key is not None:
            # Requests under another key, should there be several one day, share no prefixes.
            engine.default_cache_salt = hashlib.sha256(self._config.api_key.encode()).hexdigest()
        self.application = Application(engine, self._config, model_name=name)
        self.http_server = HttpServer(
            self.application.handle, limits=HttpLimits(max_body_bytes=self._config.max_body_bytes)
        )
        engine.metrics.include(HttpCollector(self.http_server.counters))
        await self._listen()
        try:
            if not await self._load(name):
                return EXIT_OK
            return await self._serve_until_stopped()
        finally:
            await self.http_server.close(timeout=FLUSH_SECONDS)

    def _note_signal(self) -> None:
        if self._interrupted.is_set():
            self._interrupted_again.set()
        self._interrupted.set()

    async def _listen(self) -> None:
        host = self._config.host
        await self.http_server.start(host, self._config.port)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.http_server.port}"

    async def _load(self, name: str) -> bool:
        """False when a signal came first."""
        logger.info("graphllm %s loading %s; /health at %s answers meanwhile", __version__, name, self.url)
        loading = asyncio.create_task(self.engine.start(show_progress=sys.stderr.isatty()))
        await _first_of(loading, self._interrupted)
        if not loading.done():
            # The device's worker cannot be interrupted; it is a daemon and ends with the process.
            loading.cancel()
            await asyncio.wait({loading})
            return False
        try:
            loading.result()
        except GraphLLMError as error:
            await self.engine.stop()
            if isinstance(error, StartupError):
                raise
            raise StartupError(f"The model cannot run: {error.message}") from error
        logger.info("ready: serving %s at %s (Ctrl-C drains and stops)", name, self.url)
        return True

    async def _serve_until_stopped(self) -> int:
        await _first_of(self._interrupted, self._failed)
        if self._failed.is_set():
            return await self._stop_failed()
        logger.info(
            "draining %d running requests (Ctrl-C again cuts them)", self.engine.num_unfinished_requests
        )
        draining = asyncio.create_task(self.engine.drain(self._config.drain_timeout))
        await _first_of(draining, self._interrupted_again, self._failed)
        if self._failed.is_set():
            return await self._stop_failed()
        was_cut = not draining.done()
        if not was_cut and not draining.result():
            logger.warning(
                "cut %d running requests after %g s (--drain-timeout)",
                self.engine.num_unfinished_requests,
                self._config.drain_timeout,
            )
        draining.cancel()
        await self.engine.stop()
        logger.info("stopped")
        return EXIT_CUT if was_cut else EXIT_OK

    async def _stop_failed(self) -> int:
        """Every open request has been answered by the engine; let /health be read, then give up."""
        logger.error("the engine has failed: %s", self.engine.failure)
        await asyncio.sleep(FAILURE_LINGER_SECONDS)
        await self.engine.stop()
        return EXIT_FAILED


async def _first_of(*waited: asyncio.Event | asyncio.Task[object]) -> None:
    """Return when the first has happened; events that have not are left alone."""
    waiters = [
        entry if isinstance(entry, asyncio.Task) else asyncio.ensure_future(entry.wait()) for entry in waited
    ]
    await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
    for entry, waiter in zip(waited, waiters, strict=True):
        if isinstance(entry, asyncio.Event):
            waiter.cancel()
