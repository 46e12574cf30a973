"""/v1/responses/{id}: retrieve, follow, cancel, delete, list the input.

Owns what these paths and their queries may be. Creation is `create.py`'s.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl

import orjson

from graphllm.errors import InvalidRequestError
from graphllm.server.http import Request, Response
from graphllm.server.openai.responses.background import BackgroundTask
from graphllm.server.openai.responses.protocol import ENCRYPTED_INCLUDE, LOGPROBS_INCLUDE, OTHER_INCLUDES
from graphllm.server.openai.responses.store import ResponseStore

DEFAULT_PAGE, MAX_PAGE = 20, 100
_INCLUDES = (LOGPROBS_INCLUDE, ENCRYPTED_INCLUDE, *OTHER_INCLUDES)
_RETRIEVE_NAMES = ("include", "include_obfuscation", "starting_after", "stream")
_LIST_NAMES = ("after", "include", "limit", "order")


class StoredResponses:
    """Handlers for paths below /v1/responses/; the response's id is `path_params["id"]`.

    All raise NotFoundError for a response that is not there (any more).
    """

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    def cancel(self, request: Request, response: Response) -> None:
        """Raises InvalidRequestError for what does not run in the background."""
        response_id = request.path_params["id"]
        _query(request, ())
        stored = self._store.get(response_id)
        if not isinstance(stored.background, BackgroundTask):
            raise InvalidRequestError(
                f"Response '{response_id}' was not created with background=true, so it cannot be cancelled; "
                "close the connection instead."
            )
        stored.background.cancel()
        response.send(200, stored.body)

    def delete(self, request: Request, response: Response) -> None:
        """A response that runs is stopped."""
        _query(request, ())
        response_id = request.path_params["id"]
        stored = self._store.delete(response_id)
        if isinstance(stored.background, BackgroundTask):
            stored.background.discard()
        response.send(200, orjson.dumps({"id": response_id, "object": "response", "deleted": True}))

    def retrieve(self, request: Request, response: Response) -> None:
        """Raises InvalidRequestError for a query that cannot be honoured."""
        stored = self._store.get(request.path_params["id"])
        query = _query(request, _RETRIEVE_NAMES)
        if _boolean(query, "include_obfuscation"):
            raise InvalidRequestError(
                "'include_obfuscation': events are not padded.", param="include_obfuscation"
            )
        if not _boolean(query, "stream"):
            if "starting_after" in query:
                raise InvalidRequestError(
                    "'starting_after' is only allowed with stream=true.", param="starting_after"
                )
            response.send(200, stored.body)
            return
        log = stored.background.log if isinstance(stored.background, BackgroundTask) else None
        if log is None:
            raise InvalidRequestError(
                "'stream': only responses that were created with both background and stream can be "
                "streamed again.",
                param="stream",
            )
        starting_after = _integer(query, "starting_after", default=-1, least=0, most=2**31)
        log.follow(response, starting_after=starting_after, headers=(("x-request-id", stored.response_id),))

    def list_input(self, request: Request, response: Response) -> None:
        """Raises InvalidRequestError for a query that cannot be honoured."""
        stored = self._store.get(request.path_params["id"])
        query = _query(request, _LIST_NAMES)
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise InvalidRequestError("'order' must be asc or desc.", param="order")
        limit = _integer(query, "limit", default=DEFAULT_PAGE, least=1, most=MAX_PAGE)
        items: list[dict[str, Any]] = [
            item
            for turn in stored.turn.history()
            for item in _shown_items(turn.input_items, turn.output_items, is_last=turn is stored.turn)
        ]
        if order == "desc":
            items.reverse()
        if (after := query.get("after")) is not None:
            position = next((i for i, item in enumerate(items) if item["id"] == after), None)
            if position is None:
                raise InvalidRequestError(f"'after': there is no item {after[:80]!r}.", param="after")
            items = items[position + 1 :]
        page = items[:limit]
        body = {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(items) > len(page),
        }
        response.send(200, orjson.dumps(body))


def _shown_items(input_items: bytes, output_items: bytes, *, is_last: bool) -> list[dict[str, Any]]:
    """What went into a response: the turns before it whole, of its own turn the input."""
    items: list[dict[str, Any]] = orjson.loads(input_items)
    return items if is_last else items + orjson.loads(output_items)


def _query(request: Request, known: tuple[str, ...]) -> dict[str, str]:
    """The query's values. Raises InvalidRequestError for a name that is unknown or comes twice."""
    try:
        pairs = parse_qsl(request.query.decode(), keep_blank_values=True, max_num_fields=32)
    except ValueError:
        raise InvalidRequestError("The query cannot be read.") from None
    values: dict[str, str] = {}
    for name, value in pairs:
        name = "include" if name == "include[]" else name
        if name not in known:
            raise InvalidRequestError(f"Unknown query parameter: '{name[:60]}'.", param=name[:60])
        if name == "include":
            # What can be included is there already, or does not exist here.
            for entry in value.split(","):
                if entry not in _INCLUDES:
                    raise InvalidRequestError(
                        f"'include' must be one of {', '.join(_INCLUDES)}.", param="include"
                    )
        elif name in values:
            raise InvalidRequestError(f"'{name}' is given twice.", param=name)
        values[name] = value
    return values


def _boolean(query: dict[str, str], name: str) -> bool:
    value = query.get(name, "false")
    if value not in ("true", "false"):
        raise InvalidRequestError(f"'{name}' must be true or false.", param=name)
    return value == "true"


def _integer(query: dict[str, str], name: str, *, default: int, least: int, most: int) -> int:
    text = query.get(name)
    if text is None:
        return default
    # A limit on the digits, because int() refuses thousands of them with another error.
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and least <= int(text) <= most):
        raise InvalidRequestError(f"'{name}' must be an integer from {least} to {most}.", param=name)
    return int(text)
