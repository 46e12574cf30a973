"""POST /v1/responses: from a body to a running response.

Owns the order of the checks, and what a response object repeats of its request. The parts of the translation
are in files of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import uuid4

import msgspec

from graphllm.errors import ContextLengthError, InvalidRequestError
from graphllm.sampling_params import SamplingParams
from graphllm.server import sse
from graphllm.server.generation.chat import ChatRequest, PreparedChat
from graphllm.server.generation.decoding import BodyDecoder, NestedReader
from graphllm.server.generation.fields import renamed, renamed_warning
from graphllm.server.generation.request import GenerationRequest, RequestWarning
from graphllm.server.generation.served_model import ServedModel
from graphllm.server.http import Request, Response
from graphllm.server.openai.responses.background import (
    BackgroundReply,
    BackgroundTask,
    EventLog,
    StoreEntry,
)
from graphllm.server.openai.responses.conversation import call_ids, messages_of, stored_items
from graphllm.server.openai.responses.envelope import Envelope, ResponseStatus
from graphllm.server.openai.responses.input_items import checked_items
from graphllm.server.openai.responses.known_fields import RESPONSES_FIELDS
from graphllm.server.openai.responses.protocol import ResponsesRequest
from graphllm.server.openai.responses.store import ResponseStore, StoredResponse, Turn
from graphllm.server.openai.responses.truncation import prepare_truncated
from graphllm.server.openai.responses.wire import Recorder, ResponseOptions, ResponsesWire

# How much JSON there can be for one token: an item around it, and its bytes escaped.
BYTES_AROUND_TOKEN = 512
MAX_ESCAPED_BYTES = 6


class CreateResponse:
    """Answers with a response, its events, or, in the background, with its id."""

    def __init__(self, served: ServedModel, store: ResponseStore) -> None:
        self._served = served
        self._store = store
        self._decoder = BodyDecoder(ResponsesRequest, RESPONSES_FIELDS, lenient=served.lenient)

    def create(self, request: Request, response: Response) -> None:
        """Raises GraphLLMError for whatever is wrong with the request; nothing has been sent then."""
        body = self._served.decode(request, self._decoder)
        try:
            self._create(body.fields, body.warnings, request=request, response=response)
        except InvalidRequestError as error:
            raise renamed(error, body.fields.client_names) from None

    def _create(
        self,
        fields: ResponsesRequest,
        warnings: tuple[RequestWarning, ...],
        *,
        request: Request,
        response: Response,
    ) -> None:
        fields.check()
        params = fields.sampling_params()
        warnings += self._warnings(fields)
        reader = NestedReader(lenient=self._served.lenient)
        turn, prepared = self._prepare(fields, params, reader=reader)
        warnings += tuple(reader.warnings)
        warnings += tuple(renamed_warning(warning, fields.client_names) for warning in prepared.warnings)
        generation = replace(prepared.generation, structure_name=fields.client_names["structured_outputs"])
        generation = self._served.with_lora(generation, fields.model)
        response_id = f"resp_{uuid4().hex}"
        envelope = Envelope(response_id, self._echo(fields, params, warnings))
        new_wire = partial(
            ResponsesWire,
            response_id,
            envelope,
            tokenizer=self._served.engine.tokenizer,
            options=ResponseOptions(logprobs=fields.wants_logprobs, is_summarized=fields.wants_summary),
        )
        if fields.background:
            stored = StoredResponse(response_id, turn, envelope.head(ResponseStatus.QUEUED))
            entry = StoreEntry(self._store, stored, begun=envelope.head(ResponseStatus.IN_PROGRESS))
            self._run_in_background(
                generation,
                stored,
                wire=new_wire(record=entry.record),
                entry=entry,
                stream=bool(fields.stream),
                response=response,
            )
            return
        record = self._recorder(response_id, turn) if self._stores(fields) else None
        self._served.answer(
            generation,
            model=fields.model,
            wire=new_wire(record=record),
            stream=bool(fields.stream),
            request=request,
            response=response,
        )

    def _run_in_background(
        self,
        generation: GenerationRequest,
        stored: StoredResponse,
        *,
        wire: ResponsesWire,
        entry: StoreEntry,
        stream: bool,
        response: Response,
    ) -> None:
        self._store.check_room()
        task = BackgroundTask(EventLog() if stream else None)
        task.reply = BackgroundReply(self._served.engine, wire, task=task, entry=entry)
        task.reply.submit(generation)
        stored.background = task
        self._store.add(stored)
        headers = (("x-request-id", stored.response_id),)
        if task.log is not None:
            task.log.follow(response, starting_after=-1, headers=headers)
        else:
            response.send(200, stored.body, headers=headers)

    def _prepare(
        self, fields: ResponsesRequest, params: SamplingParams, *, reader: NestedReader
    ) -> tuple[Turn, PreparedChat]:
        """What this request adds to its conversation, and the whole conversation, ready to generate."""
        max_model_len = self._served.engine.max_model_len
        if len(fields.input) > max_model_len and not isinstance(fields.input, str):
            raise ContextLengthError(
                f"'input' has {len(fields.input)} items, more than the model's context has tokens "
                f"({max_model_len}).",
                param="input",
            )
        previous = self._previous_turn(fields.previous_response_id)
        history = self._history(previous, is_truncated=fields.truncation == "auto")
        items = checked_items(fields.input, known_call_ids=call_ids(history), reader=reader)
        messages = messages_of([*history, *items])
        if fields.instructions is not None:
            messages.insert(0, {"role": "system", "content": fields.instructions})
        tools = fields.function_tools(reader)
        chat = ChatRequest(
            messages=messages,
            params=params,
            tools=tools,
            tool_choice=fields.chosen_tools(tools, reader),
            parallel_tool_calls=fields.parallel_tool_calls is not False,
            template_kwargs=fields.chat_template_kwargs or {},
            reasoning_effort=fields.reasoning.effort if fields.reasoning is not None else None,
            cache_salt=fields.cache_salt,
            priority=fields.priority or 0,
        )
        turn = Turn(previous, sse.encode_json(items))
        if fields.truncation != "auto":
            return turn, self._served.prepare_chat(chat)
        tokenizer = self._served.engine.tokenizer
        return turn, prepare_truncated(
            messages,
            prepare=lambda kept: self._served.prepare_chat(replace(chat, messages=kept)),
            count_tokens=lambda text, most: _count_tokens(tokenizer.encode, text, most),
            max_tokens=max_model_len - (params.max_tokens or 1),
        )

    def _previous_turn(self, response_id: str | None) -> Turn | None:
        if response_id is None:
            return None
        stored = self._store.get(response_id, param="previous_response_id")
        if stored.is_running:
            raise InvalidRequestError(
                f"Response '{response_id}' is still running; its conversation can go on when it has ended.",
                param="previous_response_id",
            )
        return stored.turn

    def _history(self, turn: Turn | None, *, is_truncated: bool) -> list[dict[str, Any]]:
        """Raises ContextLengthError for a conversation that is too long to be worth reading."""
        engine = self._served.engine
        max_bytes = engine.max_model_len * (
            BYTES_AROUND_TOKEN + MAX_ESCAPED_BYTES * engine.tokenizer.longest_token_bytes
        )
        items, is_whole = stored_items(turn, max_bytes=max_bytes)
        if not is_whole and not is_truncated:
            raise ContextLengthError(
                f"The conversation is far longer than the model's context of {engine.max_model_len} tokens.",
                param="previous_response_id",
            )
        return items

    def _stores(self, fields: ResponsesRequest) -> bool:
        return fields.is_stored and self._store.is_enabled

    def _recorder(self, response_id: str, turn: Turn) -> Recorder:
        def record(head: bytes, output: bytes) -> None:
            turn.output_items = output
            self._store.add(StoredResponse(response_id, turn, head))

        return record

    def _warnings(self, fields: ResponsesRequest) -> tuple[RequestWarning, ...]:
        warnings = fields.own_warnings()
        if not self._store.is_enabled:
            note = "this server stores no responses (--max-stored-responses 0)."
            if fields.background:
                raise InvalidRequestError(f"'background': {note}", param="background")
            if fields.store:
                warnings.append(RequestWarning("store", note))
        return tuple(warnings)

    def _echo(
        self, fields: ResponsesRequest, params: SamplingParams, warnings: Sequence[RequestWarning]
    ) -> dict[str, Any]:
        """The members of the response object that repeat the request, defaults filled in."""
        reasoning, text = fields.reasoning, fields.text
        text_format: dict[str, Any] = {"type": "text"}
        if text is not None and text.format is not None:
            given = msgspec.to_builtins(text.format)
            text_format = {key: value for key, value in given.items() if value is not None}
            if text_format["type"] == "json_schema":
                text_format.setdefault("name", "response")
        echo = {
            "background": bool(fields.background),
            "instructions": fields.instructions,
            "max_output_tokens": fields.max_output_tokens,
            "max_tool_calls": None,
            "metadata": fields.metadata or {},
            "model": fields.model,
            "parallel_tool_calls": fields.parallel_tool_calls is not False,
            "previous_response_id": fields.previous_response_id,
            "prompt_cache_key": fields.prompt_cache_key,
            "reasoning": {
                "effort": reasoning.effort if reasoning is not None else None,
                "summary": (reasoning.summary or reasoning.generate_summary)
                if reasoning is not None
                else None,
            },
            "safety_identifier": fields.safety_identifier,
            "service_tier": "default",
            "store": self._stores(fields),
            "temperature": params.temperature,
            "text": {"format": text_format},
            "tool_choice": fields.tool_choice or "auto",
            "tools": fields.tools or [],
            "top_logprobs": params.logprobs or 0,
            "top_p": params.top_p,
            "truncation": fields.truncation or "disabled",
            "user": fields.user,
        }
        if warnings:
            echo["warnings"] = [warning.as_json() for warning in warnings]
        return echo


def _count_tokens(encode: Any, text: str, most: int) -> int:
    try:
        return len(encode(text, max_tokens=most, param="input"))
    except ContextLengthError:
        return most
