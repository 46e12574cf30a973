"""POST /tokenize and /detokenize: the served model's tokens, as vLLM and SGLang offer them.

Owns both routes. The model is not asked: these answer while it is busy, and take no place in its queue.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec
import orjson
from msgspec import Meta

from graphllm.errors import InvalidRequestError
from graphllm.server.generation.decoding import BodyDecoder, DecodedBody
from graphllm.server.generation.fields import KnownField
from graphllm.server.generation.prompts import checked_token_ids
from graphllm.server.generation.request import RequestWarning
from graphllm.server.generation.served_model import ServedModel, check_content_type
from graphllm.server.http import Request, Response
from graphllm.server.openai.chat_protocol import ChatCompletionRequest
from graphllm.server.openai.messages import ChatMessage
from graphllm.server.openai.tools import Tool

TOKENIZE_FIELDS: Final[Mapping[str, KnownField]] = {
    "chat_template": KnownField(note="Requests bring no templates; the model's own is used."),
    "mm_processor_kwargs": KnownField(neutral=({},), note="There are no images here."),
    "media_io_kwargs": KnownField(neutral=({},), note="There are no images here."),
    "reasoning_effort": KnownField(note="Use chat_template_kwargs."),
    "tool_choice": KnownField(neutral=("auto",), note="All tools that are given are described."),
}
DETOKENIZE_FIELDS: Final[Mapping[str, KnownField]] = {}


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of POST /tokenize: a text, or a chat as /v1/chat/completions would render it."""

    prompt: Annotated[str | None, Meta(description="The text; give it or messages.")] = None
    messages: Annotated[list[ChatMessage] | None, Meta(description="The chat; give it or prompt.")] = None
    model: Annotated[str | None, Meta(description="The served model's id; may be left out.")] = None
    add_special_tokens: Annotated[
        bool | None,
        Meta(description="What the tokenizer puts around texts: on for a prompt, off for messages."),
    ] = None
    return_token_strs: Annotated[bool | None, Meta(description="Add each token's text as token_strs.")] = None
    tools: Annotated[
        list[Tool] | None, Meta(description="With messages: functions that the prompt describes.")
    ] = None
    add_generation_prompt: Annotated[
        bool | None, Meta(description="With messages: false does not open the assistant's message.")
    ] = None
    continue_final_message: Annotated[
        bool | None, Meta(description="With messages: the prompt ends in the middle of the last one.")
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, Meta(description="With messages: names for the chat template.")
    ] = None


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of POST /detokenize."""

    tokens: Annotated[list[int], Meta(description="Token ids, at most as many as the context holds.")]
    model: Annotated[str | None, Meta(description="The served model's id; may be left out.")] = None
    skip_special_tokens: Annotated[
        bool | None, Meta(description="true leaves out the text of special tokens.")
    ] = None


class Tokenization:
    """Texts and chats to token ids, and back."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served
        self._tokenize = BodyDecoder(TokenizeRequest, TOKENIZE_FIELDS, lenient=served.lenient)
        self._detokenize = BodyDecoder(DetokenizeRequest, DETOKENIZE_FIELDS, lenient=served.lenient)

    def tokenize(self, request: Request, response: Response) -> None:
        """Raises GraphLLMError for what is wrong with the body."""
        self._check(request)
        body = self._tokenize.decode(request.body)
        fields = body.fields
        self._check_model(fields.model)
        if (fields.prompt is None) == (fields.messages is None):
            raise InvalidRequestError("Give either 'prompt' or 'messages'.", param="prompt")
        if fields.prompt is not None:
            token_ids, warnings = self._text_ids(fields), body.warnings
        else:
            token_ids, chat_warnings = self._chat_ids(fields)
            warnings = (*body.warnings, *chat_warnings)
        engine = self._served.engine
        answer: dict[str, Any] = {
            "count": len(token_ids),
            "max_model_len": engine.max_model_len,
            "tokens": token_ids,
        }
        if fields.return_token_strs:
            answer["token_strs"] = [engine.tokenizer.token_text(token_id) for token_id in token_ids]
        _send(response, answer, warnings)

    def detokenize(self, request: Request, response: Response) -> None:
        """Raises GraphLLMError for what is wrong with the body."""
        self._check(request)
        body: DecodedBody[DetokenizeRequest] = self._detokenize.decode(request.body)
        fields = body.fields
        self._check_model(fields.model)
        engine = self._served.engine
        token_ids = fields.tokens
        if token_ids:
            try:
                token_ids = checked_token_ids(
                    token_ids, engine.tokenizer, path="tokens", max_model_len=engine.max_model_len
                )
            except InvalidRequestError as error:
                error.param = "tokens"
                raise
        text = engine.tokenizer.decode(token_ids, skip_special_tokens=bool(fields.skip_special_tokens))
        _send(response, {"prompt": text}, body.warnings)

    def _check(self, request: Request) -> None:
        self._served.engine.check_ready()
        check_content_type(request)

    def _check_model(self, name: str | None) -> None:
        if name is not None:
            self._served.check_name(name)

    def _text_ids(self, fields: TokenizeRequest) -> list[int]:
        for name in ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
            if getattr(fields, name) is not None:
                raise InvalidRequestError(f"'{name}' is only allowed with messages.", param=name)
        engine = self._served.engine
        assert fields.prompt is not None
        return engine.tokenizer.encode(
            fields.prompt,
            add_special_tokens=fields.add_special_tokens is not False,
            max_tokens=engine.max_model_len,
            param="prompt",
        )

    def _chat_ids(self, fields: TokenizeRequest) -> tuple[list[int], tuple[RequestWarning, ...]]:
        """The ids of the prompt that a chat completion with these fields would have."""
        assert fields.messages is not None
        chat = ChatCompletionRequest(
            model=self._served.name,
            messages=fields.messages,
            add_special_tokens=fields.add_special_tokens,
            tools=fields.tools,
            add_generation_prompt=fields.add_generation_prompt,
            continue_final_message=fields.continue_final_message,
            chat_template_kwargs=fields.chat_template_kwargs,
        )
        prepared = self._served.prepare_chat(
            chat.chat_request(max_model_len=self._served.engine.max_model_len)
        )
        return prepared.generation.prompts[0], prepared.warnings


def _send(response: Response, answer: dict[str, Any], warnings: tuple[RequestWarning, ...]) -> None:
    if warnings:
        answer["warnings"] = [warning.as_json() for warning in warnings]
    response.send(200, orjson.dumps(answer))
