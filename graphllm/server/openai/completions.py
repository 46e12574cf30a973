"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator

from graphllm.errors import GraphLLMError
from graphllm.server.error_responses import send_error
from graphllm.server.http import Request, Response
from graphllm.server.openai.decoding import BodyDecoder
from graphllm.server.openai.known_fields import COMPLETION_FIELDS
from graphllm.server.openai.prompts import encoded_prompts
from graphllm.server.openai.protocol import CompletionRequest
from graphllm.server.openai.served_model import ServedModel
from graphllm.server.openai.wire import CompletionWire, WireOptions

logger = logging.getLogger(__name__)

# How long a batch may be tokenized before the loop gets its turn.
_SLICE_SECONDS = 0.001


class Completions:
    """Continues each prompt as it stands. Choice `i * n + j` is the j-th of prompt i."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._decoder = BodyDecoder(CompletionRequest, COMPLETION_FIELDS)

    def create(self, request: Request, response: Response) -> None:
        """Raises GraphLLMError for what is wrong with the body; a batch's prompts may fail later."""
        served = self._served
        fields = served.decode(request, self._decoder)
        params = fields.sampling_params()
        wire = CompletionWire(
            served.engine.tokenizer,
            WireOptions(
                model=served.name,
                include_usage=fields.include_usage,
                logprobs=params.logprobs is not None,
                skip_special_tokens=params.skip_special_tokens,
            ),
        )

        def submit(prompts: list[list[int]]) -> None:
            served.submit(prompts, params, wire=wire, fields=fields, request=request, response=response)

        prompts = encoded_prompts(
            fields.prompt, served.engine.tokenizer, max_model_len=served.engine.max_model_len
        )
        _Admission(prompts, submit, request=request, response=response).proceed()


class _Admission:
    """Tokenizes a batch a slice at a time, because other streams go on meanwhile, and submits it."""

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
