"""The body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from graphllm.errors import InvalidRequestError
from graphllm.sampling_params import SamplingParams
from graphllm.server.openai.protocol import SamplingFields, sampling_params

# OpenAI's default for /v1/completions; a chat without a limit runs to the end of the context.
DEFAULT_COMPLETION_TOKENS = 16


class CompletionRequest(SamplingFields, kw_only=True):
    """The body of POST /v1/completions.

    `prompt` is a text, a list of texts, a list of token ids, or a list of such lists; which of them is told
    apart in `generation/prompts.py`.
    """

    prompt: Annotated[
        str | list[str | int | list[int]],
        Meta(description="A text, a list of texts, a list of token ids, or a list of such lists."),
    ]
    logprobs: Annotated[
        int | None, Meta(description="Report log probabilities and so many alternatives, 0 to 20.")
    ] = None
    echo: Annotated[
        bool | None, Meta(description="Return the prompt before the text; with logprobs, its own too.")
    ] = None
    suffix: Annotated[
        str | None,
        Meta(
            description="The text fills the gap before this one; for models with fill-in-the-middle tokens."
        ),
    ] = None

    def sampling_params(self) -> SamplingParams:
        """Raises InvalidRequestError naming the field as the client wrote it."""
        max_tokens = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        if max_tokens == 0 and not (self.echo or self.prompt_logprobs is not None):
            raise InvalidRequestError(
                "max_tokens must be at least 1, or 0 with echo or prompt_logprobs.", param="max_tokens"
            )
        scores = self.prompt_logprobs
        if self.echo and self.logprobs is not None:
            # The echoed prompt has as many alternatives as the text behind it.
            if scores is not None and scores != self.logprobs:
                raise InvalidRequestError(
                    f"prompt_logprobs ({scores}) and logprobs ({self.logprobs}) differ; with echo they are "
                    "one.",
                    param="prompt_logprobs",
                )
            scores = self.logprobs
        return sampling_params(self, max_tokens=max_tokens, logprobs=self.logprobs, prompt_logprobs=scores)

    def check(self) -> None:
        super().check()
        if self.suffix and self.echo:
            raise InvalidRequestError("'suffix' cannot be used with echo.", param="suffix")

    def in_client_terms(self, error: InvalidRequestError) -> InvalidRequestError:
        if error.param == "prompt_logprobs" and self.prompt_logprobs is None:
            error.param = "logprobs"
            error.message = error.message.replace("prompt_logprobs", "logprobs with echo", 1)
        return super().in_client_terms(error)
