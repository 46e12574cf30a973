"""Which handler answers a path and method.

Owns the table of routes and the answers 404 and 405. Knows nothing of what handlers do.

The fixed part of a route matches the bytes of the path as sent; only a parameter is decoded. So
there is one spelling of every route, and nothing that looks at the raw path (an access rule here
or in a proxy in front) can be walked around with percent-signs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

from graphllm.errors import InvalidRequestError, MethodNotAllowedError, NotFoundError
from graphllm.server.message import Request
from graphllm.server.response import Handler, Response

_PATTERN = re.compile(r"(?P<fixed>/[^{}]*)(?:\{(?P<name>[a-z_]+)(?P<rest>:path|)\}(?P<end>(?:/[^{}]+)?))?")
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")


class Router:
    """A handler that hands each request to the handler of its route.

    A pattern is a path, or a path with one parameter, which is in `request.path_params`. `{name}` takes one
    segment, and more of the path may follow (`/things/{id}/cancel`). `{name:path}` ends its pattern and takes
    the rest of the path, slashes included, whether they came as `/` or as `%2F`. Exact paths go before
    parameters, longer patterns before shorter ones.
    """

    def __init__(self) -> None:
        self._exact: dict[bytes, dict[str, Handler]] = {}
        self._with_parameter: list[_ParameterRoute] = []

    def add(self, method: str, pattern: str, handler: Handler) -> None:
        """Add a route. Raises ValueError when the pattern is malformed or already there."""
        match = _PATTERN.fullmatch(pattern)
        if match is None:
            raise ValueError(f"{pattern!r} is not a path, nor a path with one parameter")
        fixed, name, end = match["fixed"].encode(), match["name"], (match["end"] or "").encode()
        if name is not None and match["rest"] and end:
            raise ValueError(f"{pattern!r}: nothing may follow {{name:path}}")
        if name is None:
            handlers = self._exact.setdefault(fixed, {})
        else:
            handlers = self._handlers_of(_ParameterRoute(fixed, name, end, takes_rest=bool(match["rest"])))
        if method in handlers:
            raise ValueError(f"{method} {pattern} has a handler already")
        handlers[method] = handler

    def __call__(self, request: Request, response: Response) -> None:
        """Pass the request on. Raises NotFoundError, and InvalidRequestError for a bad parameter."""
        handlers = self._exact.get(request.raw_path)
        if handlers is None:
            handlers = self._match_prefix(request)
        handler = handlers.get(request.method)
        if handler is None and request.method == "HEAD":
            handler = handlers.get("GET")
        if handler is None:
            allow = ", ".join(sorted(handlers.keys() | ({"HEAD"} if "GET" in handlers else set())))
            error = MethodNotAllowedError(f"{request.path} does not take {request.method}; it takes {allow}.")
            response.send_error(error, headers=(("Allow", allow),))
            return
        handler(request, response)

    def _handlers_of(self, new: _ParameterRoute) -> dict[str, Handler]:
        for known in self._with_parameter:
            if (known.prefix, known.end, known.takes_rest) == (new.prefix, new.end, new.takes_rest):
                if known.name != new.name:
                    raise ValueError(
                        f"the parameter after {new.prefix.decode()} is {known.name!r}, not {new.name!r}"
                    )
                return known.handlers
        self._with_parameter.append(new)
        self._with_parameter.sort(key=lambda route: (len(route.prefix), len(route.end)), reverse=True)
        return new.handlers

    def _match_prefix(self, request: Request) -> dict[str, Handler]:
        for route in self._with_parameter:
            raw = route.raw_parameter(request.raw_path)
            if raw is not None:
                request.path_params[route.name] = _decode_parameter(raw, route.name)
                return route.handlers
        raise NotFoundError(f"There is no {request.path[:200]} here.")


@dataclass(frozen=True, slots=True)
class _ParameterRoute:
    """The bytes around a parameter, and who answers by method."""

    prefix: bytes
    name: str
    end: bytes
    takes_rest: bool
    handlers: dict[str, Handler] = field(default_factory=dict)

    def raw_parameter(self, raw_path: bytes) -> bytes | None:
        """The parameter as it was sent; None where the path is another route's."""
        if not (raw_path.startswith(self.prefix) and raw_path.endswith(self.end)):
            return None
        raw = raw_path[len(self.prefix) : len(raw_path) - len(self.end)]
        if not raw or (not self.takes_rest and b"/" in raw):
            return None
        return raw


def _decode_parameter(raw: bytes, name: str) -> str:
    """Undo percent-encoding once. Raises InvalidRequestError unless the result is UTF-8."""
    if _BAD_ESCAPE.search(raw):
        raise InvalidRequestError(f"The {name} in the path has a '%' without two hex digits.", param=name)
    try:
        return unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        raise InvalidRequestError(f"The {name} in the path is not UTF-8.", param=name) from None
