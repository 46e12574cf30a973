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
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from graphllm.errors import InvalidRequestError, UnsupportedFieldError
from graphllm.server.generation.body_size import check_work
from graphllm.server.generation.fields import KnownField
from graphllm.server.generation.request import RequestWarning

RequestType = TypeVar("RequestType", bound=msgspec.Struct)

_MAX_SHOWN = 64
_MAX_WARNINGS = 32
# A lenient server reads a body anew for each unknown field inside it: a few times where it is a large one.
_MAX_READ_ANEW = 4 * 1024**2  # bytes
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
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


@dataclass(frozen=True, slots=True)
class DecodedBody(Generic[RequestType]):
    """The checked struct, and what was accepted without being honoured."""

    fields: RequestType
    warnings: tuple[RequestWarning, ...] = ()


class BodyDecoder(Generic[RequestType]):
    """Decodes the bodies of one endpoint.

    known_fields: what the endpoint's API has beside the struct's fields. lenient: fields that nobody knows
    are dropped with a warning instead of refused.
    """

    def __init__(
        self,
        request_type: type[RequestType],
        known_fields: Mapping[str, KnownField],
        *,
        lenient: bool = False,
    ) -> None:
        self._request_type = request_type
        self._known_fields = known_fields
        self._lenient = lenient
        self._fields = frozenset(request_type.__struct_fields__)
        self._nested_fields = sorted(_nested_fields(request_type))
        self._decoder = msgspec.json.Decoder(request_type)

    def decode(self, body: bytes) -> DecodedBody[RequestType]:
        """Raises InvalidRequestError or UnsupportedFieldError, PayloadTooLargeError for too many values."""
        check_work(body)
        try:
            return DecodedBody(self._decoder.decode(body))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return self._decode_in_two_passes(body, error)

    def _decode_in_two_passes(self, body: bytes, first_error: Exception) -> DecodedBody[RequestType]:
        fields = self._plain_json(body, first_error)
        if not isinstance(fields, dict):
            raise InvalidRequestError("The request body must be a JSON object.")
        honoured = {}
        warnings = []
        for name, value in fields.items():
            if name in self._fields:
                honoured[name] = value
            elif name in self._known_fields:
                warnings += self._judge(name, value)
            elif self._lenient and len(warnings) < _MAX_WARNINGS:
                warnings.append(RequestWarning(name[:_MAX_SHOWN], "unknown field, ignored"))
            else:
                raise _unknown_field(name, name, {*self._fields, *self._known_fields})
        max_removed = max(1, _MAX_READ_ANEW // len(body)) if self._lenient else 0
        return DecodedBody(self._convert(honoured, warnings, max_removed=max_removed), tuple(warnings))

    def _judge(self, name: str, value: Any) -> list[RequestWarning]:
        """What to say of a field that is not honoured. Raises UnsupportedFieldError."""
        known = self._known_fields[name]
        if known.asks_for_nothing(value):
            return []
        if known.is_tolerated:
            return [RequestWarning(name, known.note)]
        choices = " or ".join(str(msgspec.json.encode(other), "utf-8") for other in known.neutral)
        hint = f"; only {choices} is accepted" if choices else ""
        raise UnsupportedFieldError(
            f"'{name}' is not supported by this server{hint}. {known.note}", param=name
        )

    def _convert(
        self, honoured: dict[str, Any], warnings: list[RequestWarning], *, max_removed: int
    ) -> RequestType:
        """The struct, without up to `max_removed` fields inside it that nobody knows."""
        while True:
            try:
                return msgspec.convert(honoured, self._request_type, strict=True)
            except msgspec.ValidationError as error:
                unknown = _unknown_nested(error)
                max_removed -= 1
                if unknown is None or max_removed < 0 or len(warnings) >= _MAX_WARNINGS:
                    raise _explained(error, known=self._nested_fields) from None
                _remove(honoured, *unknown)
                warnings.append(RequestWarning(_join(*unknown)[:_MAX_SHOWN], "unknown field, ignored"))

    def _plain_json(self, body: bytes, first_error: Exception) -> Any:
        try:
            return msgspec.json.decode(body)
        except RecursionError:
            raise InvalidRequestError("The request body is nested too deeply.") from None
        except UnicodeDecodeError:
            raise InvalidRequestError("The request body is not valid UTF-8.") from None
        except msgspec.ValidationError as error:
            # A number that no field could hold; the struct's decoder knew its name.
            located = first_error if isinstance(first_error, msgspec.ValidationError) else error
            raise _explained(located, known=self._nested_fields) from None
        except msgspec.DecodeError as error:
            if not body.strip():
                raise InvalidRequestError("The request body is empty; a JSON object is needed.") from None
            hint = ""
            if _LONE_SURROGATE.search(body):
                hint = r" (a \ud800 to \udfff escape needs its other half)"
            raise InvalidRequestError(f"The request body is not valid JSON: {error}{hint}.") from None


class NestedReader:
    """Reads the parts of one body that its struct holds as plain objects, as strictly as the rest.

    lenient: as in `BodyDecoder`; `warnings` has what was dropped.
    """

    def __init__(self, *, lenient: bool = False) -> None:
        self._lenient = lenient
        self.warnings: list[RequestWarning] = []

    def read(self, value: Any, nested_type: type[RequestType], *, path: str) -> RequestType:
        """path: where the body has it, such as `input[3]`. Raises InvalidRequestError naming the field."""
        while True:
            try:
                return msgspec.convert(value, nested_type, strict=True)
            except msgspec.ValidationError as error:
                unknown = _unknown_nested(error)
                if unknown is None or not self._lenient or len(self.warnings) >= _MAX_WARNINGS:
                    raise _explained(error, known=nested_type.__struct_fields__, inside=path) from None
                _remove(value, *unknown)
                dropped = _join(_inside(path, unknown[0]), unknown[1])
                self.warnings.append(RequestWarning(dropped[:_MAX_SHOWN], "unknown field, ignored"))


def _nested_fields(request_type: type[msgspec.Struct]) -> set[str]:
    """Names of the fields of all structs inside a request, for hints."""
    names: set[str] = set()
    seen: set[type] = {request_type}
    waiting: list[Any] = [msgspec.inspect.type_info(request_type)]
    while waiting:
        info = waiting.pop()
        if isinstance(info, msgspec.inspect.StructType):
            if info.cls is not request_type:
                names.update(field.encode_name for field in info.fields)
            for field in info.fields:
                waiting += [field.type]
            continue
        for name in ("types", "item_type", "value_type"):
            inner = getattr(info, name, None)
            for each in inner if isinstance(inner, tuple) else (inner,):
                cls = getattr(each, "cls", None)
                if each is None or cls in seen:
                    continue
                if cls is not None:
                    seen.add(cls)
                waiting.append(each)
    return names


def _unknown_nested(error: msgspec.ValidationError) -> tuple[str, str] | None:
    """(path of the object, field) where a validation error is about an unknown field."""
    located = _LOCATED.fullmatch(str(error))
    match = _UNKNOWN.fullmatch(located["what"]) if located is not None else None
    if located is None or match is None or "[...]" in (located["path"] or ""):
        return None
    return located["path"] or "", match[1]


def _remove(fields: dict[str, Any], path: str, name: str) -> None:
    """Remove `name` from the object at `path`, such as `messages[0].content[1]`."""
    target: Any = fields
    for step in re.findall(r"[^.\[\]]+", path):
        target = target[int(step)] if isinstance(target, list) else target[step]
    del target[name]


def _explained(
    error: msgspec.ValidationError, *, known: Collection[str], inside: str = ""
) -> InvalidRequestError:
    """msgspec's one-line reason in the words of the API, with the path (below `inside`) as `param`."""
    located = _LOCATED.fullmatch(str(error))
    assert located is not None
    # "[...]" stands for the values of an object with arbitrary keys.
    what, path = located["what"], (located["path"] or "").replace("[...]", "")
    path = _inside(inside, path)
    if match := re.fullmatch(r"Object missing required field `(.*)`", what, re.DOTALL):
        param = _join(path, match[1])
        return InvalidRequestError(f"Missing required field: '{param}'.", param=param)
    if match := _UNKNOWN.fullmatch(what):
        return _unknown_field(match[1], _join(path, match[1]), known)
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


def _inside(outer: str, path: str) -> str:
    """A path below another one; either may be empty, and arrays begin with a bracket."""
    return outer + path if not outer or not path or path.startswith("[") else f"{outer}.{path}"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
