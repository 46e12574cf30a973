"""POST /v1/chat/completions."""

from __future__ import annotations

from graphllm.errors import ContextLengthError, InvalidRequestError
from graphllm.server.http import Request, Response
from graphllm.server.openai.decoding import BodyDecoder
from graphllm.server.openai.known_fields import CHAT_FIELDS
from graphllm.server.openai.messages import template_messages
from graphllm.server.openai.protocol import ChatCompletionRequest
from graphllm.server.openai.served_model import ServedModel
from graphllm.server.openai.wire import ChatWire, WireOptions


class ChatCompletions:
    """Renders the model's chat template and generates the assistant's next message."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._decoder = BodyDecoder(ChatCompletionRequest, CHAT_FIELDS)

    def create(self, request: Request, response: Response) -> None:
        """Raises GraphLLMError for whatever is wrong with the request; nothing has been sent then."""
        served = self._served
        fields = served.decode(request, self._decoder)
        params = fields.sampling_params()
        prompt_token_ids = self._encode(fields)
        wire = ChatWire(
            served.engine.tokenizer,
            WireOptions(
                model=served.name,
                include_usage=fields.include_usage,
                logprobs=params.logprobs is not None,
                skip_special_tokens=params.skip_special_tokens,
            ),
        )
        try:
            served.submit(
                [prompt_token_ids], params, wire=wire, fields=fields, request=request, response=response
            )
        except InvalidRequestError as error:
            raise fields.in_client_terms(error) from None

    def _encode(self, fields: ChatCompletionRequest) -> list[int]:
        engine = self._served.engine
        if engine.tokenizer.chat_template is None:
            raise InvalidRequestError(
                "This model has no chat template; use /v1/completions.", param="messages"
            )
        messages = template_messages(fields.messages, engine.tokenizer.chat_template.source)
        # Before rendering: a chat that is far too long should not be put together first.
        num_chars = sum(len(message["content"]) for message in messages)
        at_least = num_chars // engine.tokenizer.longest_token_bytes
        if at_least > engine.max_model_len:
            raise ContextLengthError(
                f"The model's context is {engine.max_model_len} tokens, but the messages have at least "
                f"{at_least} tokens ({num_chars} characters).",
                param="messages",
            )
        return engine.tokenizer.encode_chat(messages, max_tokens=engine.max_model_len)
