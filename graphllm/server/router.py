"""Which handler answers a path and method.

Owns the table of routes and the answers 404 and 405. Knows nothing of what handlers do.

The fixed part of a route matches the bytes of the path as sent; only a parameter is decoded. So
there is one spelling of every route, and nothing that looks at the raw path (an access rule here
or in a proxy in front) can be walked around with percent-signs.
"""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

from graphllm.errors import InvalidRequestError, MethodNotAllowedError, NotFoundError
from graphllm.server.message import Request
from graphllm.server.response import Handler, Response

_PATTERN = re.compile(r"(?P<fixed>/[^{}]*)(?:\{(?P<name>[a-z_]+):path\})?")
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")


class Router:
    """A handler that hands each request to the handler of its route.

    A pattern is a path, or a path that ends in `{name:path}`: the parameter takes the rest of the
    path, slashes included, whether they came as `/` or as `%2F`, and is in `request.path_params`.
    Exact paths go before parameters, longer prefixes before shorter ones.
    """

    def __init__(self) -> None:
        self._exact: dict[bytes, dict[str, Handler]] = {}
        # (prefix, parameter name, handlers by method), longest prefix first
        self._prefixes: list[tuple[bytes, str, dict[str, Handler]]] = []

    def add(self, method: str, pattern: str, handler: Handler) -> None:
        """Add a route. Raises ValueError when the pattern is malformed or already there."""
        match = _PATTERN.fullmatch(pattern)
        if match is None:
            raise ValueError(f"{pattern!r} is not a path, nor a path that ends in {{name:path}}")
        fixed, name = match["fixed"].encode(), match["name"]
        handlers = self._exact.setdefault(fixed, {}) if name is None else self._prefix_handlers(fixed, name)
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

    def _prefix_handlers(self, prefix: bytes, name: str) -> dict[str, Handler]:
        for known_prefix, known_name, handlers in self._prefixes:
            if known_prefix == prefix:
                if known_name != name:
                    raise ValueError(
                        f"the parameter after {prefix.decode()} is {known_name!r} already, not {name!r}"
                    )
                return handlers
        new: dict[str, Handler] = {}
        self._prefixes.append((prefix, name, new))
        self._prefixes.sort(key=lambda entry: len(entry[0]), reverse=True)
        return new

    def _match_prefix(self, request: Request) -> dict[str, Handler]:
        raw_path = request.raw_path
        for prefix, name, handlers in self._prefixes:
            if raw_path.startswith(prefix) and len(raw_path) > len(prefix):
                request.path_params[name] = _decode_parameter(raw_path[len(prefix) :], name)
                return handlers
        raise NotFoundError(f"There is no {request.path[:200]} here.")


def _decode_parameter(raw: bytes, name: str) -> str:
    """Undo percent-encoding once. Raises InvalidRequestError unless the result is UTF-8."""
    if _BAD_ESCAPE.search(raw):
        raise InvalidRequestError(f"The {name} in the path has a '%' without two hex digits.", param=name)
    try:
        return unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        raise InvalidRequestError(f"The {name} in the path is not UTF-8.", param=name) from None
