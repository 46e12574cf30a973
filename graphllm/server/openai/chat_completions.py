"""POST /v1/chat/completions."""

from __future__ import annotations

from dataclasses import replace

from graphllm.errors import InvalidRequestError
from graphllm.server.generation.decoding import BodyDecoder
from graphllm.server.generation.request import GenerationRequest, RequestWarning
from graphllm.server.generation.served_model import ServedModel
from graphllm.server.http import Request, Response
from graphllm.server.openai.chat_protocol import ChatCompletionRequest
from graphllm.server.openai.chat_wire import ChatWire
from graphllm.server.openai.choice_wire import WireOptions
from graphllm.server.openai.known_fields import CHAT_FIELDS


class ChatCompletions:
    """Renders the model's chat template and generates the assistant's next message."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._decoder = BodyDecoder(ChatCompletionRequest, CHAT_FIELDS, lenient=served.lenient)

    def create(self, request: Request, response: Response) -> None:
        """Raises GraphLLMError for whatever is wrong with the request; nothing has been sent then."""
        served = self._served
        body = served.decode(request, self._decoder)
        fields = body.fields
        try:
            chat = fields.chat_request(max_model_len=served.engine.max_model_len)
            prepared = served.prepare_chat(chat)
            renamed = tuple(fields.warning_in_client_terms(warning) for warning in prepared.warnings)
            generation = prepared.generation
            if generation.params.structured_outputs is not None:
                generation = replace(generation, structure_name=fields.structure_name)
            options = self._wire_options(fields, generation, (*body.warnings, *renamed))
            wire = ChatWire(served.engine.tokenizer, options)
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

    def _wire_options(
        self,
        fields: ChatCompletionRequest,
        generation: GenerationRequest,
        warnings: tuple[RequestWarning, ...],
    ) -> WireOptions:
        params = generation.params
        return WireOptions(
            model=fields.model,
            include_usage=fields.include_usage,
            continuous_usage=fields.continuous_usage,
            logprobs=params.logprobs is not None,
            prompt_logprobs=params.prompt_logprobs is not None,
            tokens_as_ids=bool(fields.return_tokens_as_token_ids),
            skip_special_tokens=params.skip_special_tokens,
            token_ids=bool(fields.return_token_ids),
            legacy_function_call=fields.uses_functions,
            prompts=generation.prompts,
            num_choices_per_prompt=params.n,
            warnings=warnings,
        )
