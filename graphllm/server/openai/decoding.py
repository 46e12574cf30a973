"""From the bytes of a request body to a checked struct, or to an error that names the field.

The usual body takes one pass: msgspec decodes straight into the struct. A body that does not fit is
read again as plain JSON to find out why: a field that is known but not honoured, a misspelt one (the
error names the nearest), a wrong type, or no JSON at all. Every error is an InvalidRequestError whose
`param` is the field's path, such as `messages[0].content`.

Of duplicate keys the last wins, as with every JSON parser in common use. NaN and Infinity are not
JSON and are refused, and so are lone surrogates, which no UTF-8 text can hold.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any, Generic, TypeVar

import msgspec

from graphllm.errors import InvalidRequestError, UnsupportedFieldError
from graphllm.server.openai.known_fields import changes_nothing
from graphllm.server.openai.protocol import (
    ChatMessage,
    FunctionCall,
    SamplingFields,
    StreamOptions,
    ToolCall,
)

RequestType = TypeVar("RequestType", bound=msgspec.Struct)

_MAX_SHOWN = 64
_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_LOCATED = re.compile(r"(?P<what>.*?)(?: - at `(?:key in )?\$\.?(?P<path>.*)`)?", re.DOTALL)
_TYPE_WORDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "a boolean",
    "array": "an array",
    "object": "an object",
    "null": "null",
}
_NESTED_FIELDS = sorted(
    {
        name
        for struct in (ChatMessage, StreamOptions, ToolCall, FunctionCall)
        for name in struct.__struct_fields__
    }
)


class BodyDecoder(Generic[RequestType]):
    """Decodes the bodies of one endpoint.

    unsupported: the endpoint's fields that are known and not honoured, with the values that change
    nothing (`known_fields.py`).
    """

    def __init__(self, request_type: type[RequestType], unsupported: Mapping[str, tuple[Any, ...]]) -> None:
        self._request_type = request_type
        self._unsupported = unsupported
        self._fields = frozenset(request_type.__struct_fields__)
        self._decoder = msgspec.json.Decoder(request_type)

    def decode(self, body: bytes) -> RequestType:
        """Raises InvalidRequestError or UnsupportedFieldError."""
        try:
            request = self._decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            request = self._decode_in_two_passes(body, error)
        if isinstance(request, SamplingFields):
            _check_stream_options(request)
        return request

    def _decode_in_two_passes(self, body: bytes, first_error: Exception) -> RequestType:
        fields = _plain_json(body, first_error)
        if not isinstance(fields, dict):
            raise InvalidRequestError("The request body must be a JSON object.")
        honoured = {}
        for name, value in fields.items():
            if name in self._fields:
                honoured[name] = value
            elif name in self._unsupported:
                self._check_unsupported(name, value, fields)
            else:
                raise _unknown_field(name, name, {*self._fields, *self._unsupported})
        try:
            return msgspec.convert(honoured, self._request_type, strict=True)
        except msgspec.ValidationError as error:
            raise _explained(error) from None

    def _check_unsupported(self, name: str, value: Any, fields: dict[str, Any]) -> None:
        allowed = self._unsupported[name]
        if name == "best_of":
            # As many candidates as answers: there is nothing to choose from.
            allowed = (fields.get("n") or 1,)
        if not changes_nothing(value, allowed):
            choices = " or ".join(str(msgspec.json.encode(other), "utf-8") for other in allowed)
            hint = f"; only {choices} is accepted" if choices else ""
            raise UnsupportedFieldError(f"'{name}' is not supported by this server{hint}.", param=name)


def _plain_json(body: bytes, first_error: Exception) -> Any:
    try:
        return msgspec.json.decode(body)
    except RecursionError:
        raise InvalidRequestError("The request body is nested too deeply.") from None
    except UnicodeDecodeError:
        raise InvalidRequestError("The request body is not valid UTF-8.") from None
    except msgspec.ValidationError as error:
        # A number that no field could hold; the struct's decoder knew its name.
        located = first_error if isinstance(first_error, msgspec.ValidationError) else error
        raise _explained(located) from None
    except msgspec.DecodeError as error:
        if not body.strip():
            raise InvalidRequestError("The request body is empty; a JSON object is needed.") from None
        hint = ""
        if _LONE_SURROGATE.search(body):
            hint = r" (a \ud800 to \udfff escape needs its other half)"
        raise InvalidRequestError(f"The request body is not valid JSON: {error}{hint}.") from None


def _check_stream_options(request: SamplingFields) -> None:
    options = request.stream_options
    if options is None:
        return
    if not request.stream:
        raise InvalidRequestError(
            "stream_options is only allowed when stream is true.", param="stream_options"
        )
    for name in ("include_obfuscation", "continuous_usage_stats"):
        if getattr(options, name):
            raise UnsupportedFieldError(
                f"'stream_options.{name}' is not supported by this server; only false is accepted.",
                param=f"stream_options.{name}",
            )


def _explained(error: msgspec.ValidationError) -> InvalidRequestError:
    """msgspec's one-line reason in the words of the API, with the path as `param`."""
    located = _LOCATED.fullmatch(str(error))
    assert located is not None
    # "[...]" stands for the values of an object with arbitrary keys.
    what, path = located["what"], (located["path"] or "").replace("[...]", "")
    if match := re.fullmatch(r"Object missing required field `(.*)`", what, re.DOTALL):
        param = _join(path, match[1])
        return InvalidRequestError(f"Missing required field: '{param}'.", param=param)
    if match := re.fullmatch(r"Object contains unknown field `(.*)`", what, re.DOTALL):
        return _unknown_field(match[1], _join(path, match[1]), _NESTED_FIELDS)
    if match := re.fullmatch(r"Expected `(.*)`, got `(.*)`", what):
        wanted = [_TYPE_WORDS.get(word, word) for word in match[1].split(" | ") if word != "null"]
        got = _TYPE_WORDS.get(match[2], match[2])
        return InvalidRequestError(
            f"'{path}' must be {' or '.join(wanted) or 'null'}, not {got}.", param=path or None
        )
    return InvalidRequestError(f"'{path}': {what}.", param=path or None)


def _unknown_field(name: str, path: str, known: Collection[str]) -> InvalidRequestError:
    shown = path if len(path) <= _MAX_SHOWN else path[:_MAX_SHOWN] + "..."
    nearest = difflib.get_close_matches(name[:_MAX_SHOWN], known, n=1)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    return InvalidRequestError(f"Unknown field: '{shown}'.{hint}", param=shown, code="unknown_parameter")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
