"""POST /v1/completions."""

from __future__ import annotations

from graphllm.errors import InvalidRequestError
from graphllm.sampling_params import SamplingParams
from graphllm.server.generation.admission import Admission
from graphllm.server.generation.decoding import BodyDecoder, DecodedBody
from graphllm.server.generation.fill_in_middle import gap_prompts
from graphllm.server.generation.prompts import Truncation, encoded_prompts
from graphllm.server.generation.request import GenerationRequest
from graphllm.server.generation.served_model import ServedModel
from graphllm.server.http import Request, Response
from graphllm.server.openai.choice_wire import WireOptions
from graphllm.server.openai.completion_protocol import CompletionRequest
from graphllm.server.openai.completion_wire import CompletionWire
from graphllm.server.openai.known_fields import COMPLETION_FIELDS

# Of an echoed prompt in a stream, whose first chunk holds all of them: a few milliseconds of JSON.
MAX_STREAMED_PROMPT_LOGPROBS = 2048


class Completions:
    """Continues each prompt as it stands. Choice `i * n + j` is the j-th of prompt i."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._decoder = BodyDecoder(CompletionRequest, COMPLETION_FIELDS, lenient=served.lenient)

    def create(self, request: Request, response: Response) -> None:
        """Raises GraphLLMError for what is wrong with the body; a batch's prompts may fail later."""
        served = self._served
        body = served.decode(request, self._decoder)
        fields = body.fields
        fields.check()
        params = fields.sampling_params()
        tokenizer, max_model_len = served.engine.tokenizer, served.engine.max_model_len
        truncated = fields.truncation(max_model_len=max_model_len, max_tokens=params.max_tokens)
        prompt = fields.prompt
        if fields.suffix:
            prompt = gap_prompts(prompt, fields.suffix, tokenizer.added_tokens)
        encoded = encoded_prompts(
            prompt,
            tokenizer,
            max_model_len=max_model_len,
            truncated=truncated,
            add_special_tokens=fields.add_special_tokens is not False,
        )

        def submit(prompts: list[list[int]]) -> None:
            generation = GenerationRequest(
                prompts=prompts,
                params=params,
                cache_salt=fields.cache_salt,
                priority=fields.priority or 0,
                structure_name=fields.structure_name,
            )
            try:
                _check_streamed_logprobs(fields, params, prompts)
                options = self._wire_options(body, params, prompts, truncated=truncated)
                wire = CompletionWire(tokenizer, options)
                fields.log_labels(wire.reply_id)
                served.answer(
                    generation,
                    model=fields.model,
                    wire=wire,
                    stream=bool(fields.stream),
                    request=request,
                    response=response,
                )
            except InvalidRequestError as error:
                raise fields.in_client_terms(error) from None

        Admission(encoded, submit, request=request, response=response).proceed()

    def _wire_options(
        self,
        body: DecodedBody[CompletionRequest],
        params: SamplingParams,
        prompts: list[list[int]],
        *,
        truncated: Truncation | None,
    ) -> WireOptions:
        fields = body.fields
        echoes = None
        if fields.echo:
            echoes = self._echoes(fields, params, prompts, truncated=truncated)
        return WireOptions(
            model=fields.model,
            include_usage=fields.include_usage,
            continuous_usage=fields.continuous_usage,
            logprobs=params.logprobs is not None,
            prompt_logprobs=fields.prompt_logprobs is not None,
            tokens_as_ids=bool(fields.return_tokens_as_token_ids),
            skip_special_tokens=params.skip_special_tokens,
            token_ids=bool(fields.return_token_ids),
            prompts=prompts,
            echoes=echoes,
            num_choices_per_prompt=params.n,
            warnings=body.warnings,
        )

    def _echoes(
        self,
        fields: CompletionRequest,
        params: SamplingParams,
        prompts: list[list[int]],
        *,
        truncated: Truncation | None,
    ) -> list[str]:
        """The prompts as they came, or, of ids and what was cut, as they read."""
        given = [fields.prompt] if isinstance(fields.prompt, str) else fields.prompt
        if truncated is None and all(isinstance(entry, str) for entry in given):
            return [str(entry) for entry in given]
        tokenizer = self._served.engine.tokenizer
        return [
            tokenizer.decode(token_ids, skip_special_tokens=params.skip_special_tokens)
            for token_ids in prompts
        ]


def _check_streamed_logprobs(
    fields: CompletionRequest, params: SamplingParams, prompts: list[list[int]]
) -> None:
    """Raises InvalidRequestError for a stream whose first chunk would take long to write."""
    if not (fields.stream and fields.echo) or params.logprobs is None:
        return
    num_entries = (params.logprobs + 1) * max(map(len, prompts)) * params.n
    if num_entries > MAX_STREAMED_PROMPT_LOGPROBS:
        raise InvalidRequestError(
            f"'logprobs' of an echoed prompt: {num_entries} numbers are too many for a stream, at most "
            f"{MAX_STREAMED_PROMPT_LOGPROBS} are allowed; set stream to false.",
            param="logprobs",
        )
