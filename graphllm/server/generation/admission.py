"""A batch of prompts, tokenized a slice at a time, because other streams go on meanwhile.

Owns the slices and who answers for an error in them: the handler that began has returned by then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator

from graphllm.errors import GraphLLMError
from graphllm.server.error_responses import send_error
from graphllm.server.http import Request, Response

logger = logging.getLogger(__name__)

# How long a batch may be tokenized before the loop gets its turn.
_SLICE_SECONDS = 0.001


class Admission:
    """Tokenizes `prompts` and hands them to `submit`, unless the client goes away before.

    `submit` may raise GraphLLMError: it is answered, like those of `prompts`.
    """

    def __init__(
        self,
        prompts: Iterator[list[int]],
        submit: Callable[[list[list[int]]], None],
        *,
        request: Request,
        response: Response,
    ) -> None:
        self._prompts = prompts
        self._submit = submit
        self._request = request
        self._response = response
        self._encoded: list[list[int]] = []

    def proceed(self) -> None:
        """One slice; the next is a pass of the loop later. Answers for errors, since none may listen."""
        if self._request.disconnected:
            return
        deadline = time.perf_counter() + _SLICE_SECONDS
        try:
            for token_ids in self._prompts:
                self._encoded.append(token_ids)
                if time.perf_counter() > deadline:
                    asyncio.get_running_loop().call_soon(self.proceed)
                    return
            self._submit(self._encoded)
        except GraphLLMError as error:
            send_error(self._response, error)
        except Exception:
            logger.exception("a batch of prompts failed")
            send_error(self._response, GraphLLMError("The server had an error while handling this request."))
