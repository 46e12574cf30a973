"""What goes wrong below the API: one class for each way HTTP itself can fail.

Owns the errors that only an HTTP server meets; those it shares with the engine are in
`graphllm.errors`. Every one has an HTTP status and an OpenAI error body, so that a client library
shows the same kind of message for a slow upload as for a bad temperature.
"""

from __future__ import annotations

from graphllm.errors import GraphLLMError


class RequestTimeoutError(GraphLLMError):
    """The client began a request and did not finish sending it in time (408)."""

    status = 408
    type = "invalid_request_error"
    default_code = "request_timeout"


class TargetTooLongError(GraphLLMError):
    """The path and query together are above the limit (414)."""

    status = 414
    type = "invalid_request_error"
    default_code = "uri_too_long"


class ExpectationFailedError(GraphLLMError):
    """An `Expect` header other than `100-continue` (417)."""

    status = 417
    type = "invalid_request_error"
    default_code = "expectation_failed"


class TooManyPipelinedRequestsError(GraphLLMError):
    """More requests sent ahead on one connection than the server holds for it (429)."""

    status = 429
    type = "rate_limit_error"
    default_code = "too_many_pipelined_requests"


class HeadersTooLargeError(GraphLLMError):
    """Header lines or trailers too many or too long (431)."""

    status = 431
    type = "invalid_request_error"
    default_code = "headers_too_large"


class UnsupportedHttpError(GraphLLMError):
    """A method or transfer coding of HTTP that this server does not speak (501)."""

    status = 501
    type = "invalid_request_error"
    default_code = "not_implemented"


class TooManyConnectionsError(GraphLLMError):
    """Every connection the server allows is taken, or it is shutting down (503)."""

    status = 503
    type = "service_unavailable"
    default_code = "too_many_connections"


class VersionNotSupportedError(GraphLLMError):
    """A protocol other than HTTP/1.0 and HTTP/1.1 (505)."""

    status = 505
    type = "invalid_request_error"
    default_code = "http_version_not_supported"
