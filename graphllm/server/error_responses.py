"""An error as an HTTP answer, with what tells a client whether to try again.

openai-python retries 408, 409, 429 and 5xx by itself unless `x-should-retry: false`.
"""

from __future__ import annotations

from graphllm.errors import GraphLLMError, StepFailedError
from graphllm.server.http import Response

_UNAUTHORIZED = 401
_UNAVAILABLE = 503


def send_error(response: Response, error: GraphLLMError) -> None:
    """Answer with the error; a stream that has begun is cut."""
    response.send_error(error, headers=_headers(error))


def _headers(error: GraphLLMError) -> list[tuple[str, str]]:
    if isinstance(error, StepFailedError):
        # A request that broke a step would break the next one too, with all that share it.
        return [("x-should-retry", "false")]
    if error.status == _UNAVAILABLE:
        return [("retry-after", "1")]
    if error.status == _UNAUTHORIZED:
        return [("www-authenticate", "Bearer")]
    return []
