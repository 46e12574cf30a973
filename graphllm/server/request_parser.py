"""Bytes of one connection in, complete requests out.

Owns the reading of HTTP/1: llhttp (through httptools) does the grammar, and this file adds what
llhttp leaves to its user: limits, and the refusal of requests that are well-formed and still
cannot be served safely. It has no socket and no clock; `connection.py` has those, and decides what
is answered when.

Left to llhttp, whose defaults are strict: line ends, field syntax, Content-Length and chunk sizes,
both framings at once. No leniency is ever switched on.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import NoReturn

import httptools

from graphllm.errors import GraphLLMError, InvalidRequestError, PayloadTooLargeError
from graphllm.server.http_errors import (
    ExpectationFailedError,
    HeadersTooLargeError,
    TargetTooLongError,
    TooManyPipelinedRequestsError,
    UnsupportedHttpError,
    VersionNotSupportedError,
)
from graphllm.server.message import Headers, HttpLimits, Request

_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_VERSIONS = frozenset({"1.0", "1.1"})
# A name, an IPv4 address or a bracketed IPv6 address; then perhaps a port. No comma, no user name.
_HOST = re.compile(rb"(?:[A-Za-z0-9._~%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_ABSOLUTE_TARGET = re.compile(rb"https?://(?P<authority>[^/?]*)(?P<rest>.*)", re.IGNORECASE)


class ReadPhase(Enum):
    """What the next byte of the connection belongs to."""

    IDLE = auto()  # nothing yet: the last request is complete
    HEAD = auto()  # a request line or header lines
    BODY = auto()  # a body, chunk framing or trailers
    CLOSED = auto()  # nothing: the input was in error, or its last request has come


class _StopParsingError(Exception):
    """Leaves llhttp from within a callback; the reason is in `RequestParser.error`."""


class RequestParser:
    """Reads the requests of one connection.

    `feed` it what arrives. Once `error` is set the input is given up: the error is the answer to
    the request that was being read, and `method` is that request's method as far as it is known.
    """

    def __init__(self, limits: HttpLimits) -> None:
        self.phase = ReadPhase.IDLE
        self.error: GraphLLMError | None = None
        self.method = ""
        # The client holds its body back until it sees `100 Continue`. Whoever sends that clears this.
        self.awaits_continue = False
        self.num_body_bytes = 0

        self._limits = limits
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self._completed: list[Request] = []
        self._room = 0
        # Bytes that came in since the last event that showed progress. They are in llhttp's hands
        # or skipped by it (half a header line, a chunk extension, blank lines before a request), and
        # llhttp has no limit of its own.
        self._num_pending_bytes = 0
        self._fed = b""
        self._head_fed_earlier = bytearray()
        self._fields: list[tuple[bytes, bytes]] = []
        # Not a list of parts: of a body in two-byte chunks that would take fifty times its size.
        self._body = bytearray()
        self._forget_message()

    def feed(self, data: bytes, *, room: int) -> list[Request]:
        """Parse `data` and return the requests it completes, in order, at most `room` of them.

        A request beyond `room` is an error, like any malformed one. Never raises.
        """
        if self._parser is None:
            return []
        self._room = room
        self._num_pending_bytes += len(data)
        try:
            self._feed_through_upgrades(data)
        except httptools.HttpParserError as error:
            # After the last request of a connection more bytes are no error: nobody reads them.
            if self.error is None and self.phase is not ReadPhase.CLOSED:
                self.error = InvalidRequestError(f"This is not a valid HTTP request: {error}.")
        else:
            if self._num_pending_bytes > self._limits.max_header_bytes:
                self.error = self._headers_too_large()
        completed, self._completed = self._completed, []
        if self.error is not None or self.phase is ReadPhase.CLOSED:
            self.close()
        elif self.phase is ReadPhase.HEAD:
            self._head_fed_earlier += self._fed
        self._fed = b""
        return completed

    def close(self) -> None:
        """Stop reading for good and let go of what was read of an incomplete request."""
        self.phase = ReadPhase.CLOSED
        self.awaits_continue = False
        self._completed = []
        self._body = bytearray()
        self._fields = []
        self._head_fed_earlier.clear()
        self._parser = None  # parser and callbacks refer to each other

    def _feed_through_upgrades(self, data: bytes) -> None:
        """Feed llhttp, reading requests that offer an upgrade as if they did not.

        The JDK's client offers `Upgrade: h2c` with every first request. A server may ignore the
        offer, but llhttp takes it as accepted: it drops the body and stops behind the header
        lines. So the same head without the offer goes through a new parser, the rest follows, and
        there is only one way in which requests are checked.
        """
        while data and self._parser is not None:
            self._fed = data
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                self._parser = httptools.HttpRequestParser(self)

    def _head_without_upgrade(self) -> bytes:
        lines = [b"%b %b HTTP/%b" % (self.method.encode(), self._target, self._version.encode())]
        lines += [name + b": " + value for name, value in self._fields if name.lower() != b"upgrade"]
        return b"\r\n".join(lines) + b"\r\n\r\n"

    # Called by httptools, in the order of a message.

    def on_message_begin(self) -> None:
        self._forget_message()
        self.phase = ReadPhase.HEAD

    def on_url(self, part: bytes) -> None:
        assert self._parser is not None
        self.method = self._parser.get_method().decode("ascii")
        self._target += part
        if len(self._target) > self._limits.max_target_bytes:
            self._refuse(
                TargetTooLongError(
                    f"The URL is longer than {self._limits.max_target_bytes} bytes, the limit here."
                )
            )

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_fields += 1
        self._num_field_bytes += len(name) + len(value) + len(b": \r\n")
        if (
            self._num_fields > self._limits.max_headers
            or self._num_field_bytes + len(self._target) > self._limits.max_header_bytes
        ):
            self._refuse(self._headers_too_large())
        if self.phase is ReadPhase.BODY:
            return  # a trailer: counted, not kept
        if b"_" in name:
            # Gateways that turn names into variables cannot tell `_` from `-`, so one of the two
            # spellings could get past what the gateway checked.
            self._refuse(InvalidRequestError(f"The header name {name.decode('ascii')!r} has an underscore."))
        self._fields.append((name, value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self._version = self._parser.get_http_version()
        self._check_request_line()
        if self._parser.should_upgrade():
            self._is_upgrade = True
            return
        self._headers = Headers(self._fields)
        self._check_host()
        self._check_framing()
        expect = self._headers.get("expect")
        if expect is not None and self._version == "1.1":
            if expect.lower() != "100-continue":
                self._refuse(ExpectationFailedError(f"The expectation {expect[:100]!r} is not understood."))
            self.awaits_continue = True
        self._num_pending_bytes = 0
        self._head_fed_earlier.clear()
        self.phase = ReadPhase.BODY

    def on_body(self, part: bytes) -> None:
        self.awaits_continue = False
        self._num_pending_bytes = 0
        self.num_body_bytes += len(part)
        if self.num_body_bytes > self._limits.max_body_bytes:
            self._refuse(self._body_too_large())
        self._body += part

    def on_message_complete(self) -> None:
        if self._is_upgrade:
            return  # it comes again, without the offer
        if len(self._completed) >= self._room:
            self._refuse(
                TooManyPipelinedRequestsError(
                    "Too many requests were sent on this connection without waiting for their answers."
                )
            )
        assert self._parser is not None
        keep_alive = self._parser.should_keep_alive()
        path, _, query = self._origin_form(self._target).partition(b"?")
        self._completed.append(
            Request(
                method=self.method,
                raw_path=path,
                query=query,
                http_version=self._version,
                headers=self._headers,
                body=bytes(self._body),
                keep_alive=keep_alive,
            )
        )
        self.awaits_continue = False
        self._num_pending_bytes = 0
        self.phase = ReadPhase.IDLE if keep_alive else ReadPhase.CLOSED

    # The checks.

    def _forget_message(self) -> None:
        self.method = ""
        self.num_body_bytes = 0
        self._version = ""
        self._target = b""
        self._fields = []
        self._headers = Headers()
        self._body = bytearray()
        self._num_fields = 0
        self._num_field_bytes = 0
        self._is_upgrade = False

    def _check_request_line(self) -> None:
        if self._version not in _VERSIONS:
            self._refuse(VersionNotSupportedError(f"HTTP/{self._version} is not served here; use HTTP/1.1."))
        # llhttp also reads RTSP and does not say which it read, so look at the bytes.
        line = self._target + b" HTTP/"
        if line not in self._fed and line not in self._head_fed_earlier + self._fed:
            self._refuse(VersionNotSupportedError("Only HTTP is served here."))
        if self.method not in _METHODS:
            self._refuse(UnsupportedHttpError(f"The method {self.method} is not served here."))
        if b"#" in self._target:
            self._refuse(InvalidRequestError("A URL in a request has no fragment ('#')."))

    def _check_host(self) -> None:
        hosts = [value for name, value in self._fields if name.lower() == b"host"]
        if len(hosts) > 1:
            self._refuse(InvalidRequestError("The request has more than one Host header."))
        if not hosts and self._version == "1.1":
            self._refuse(InvalidRequestError("The request has no Host header."))
        # An absolute target, as sent to proxies, names the host once more, with the same rules.
        if not self._target.startswith((b"/", b"*")):
            match = _ABSOLUTE_TARGET.fullmatch(self._target)
            if match is None:
                self._refuse(InvalidRequestError("The URL is neither a path nor an http URL."))
            hosts.append(match["authority"])
        for host in hosts:
            if _HOST.fullmatch(host) is None:
                self._refuse(InvalidRequestError(f"{host[:100].decode('latin-1')!r} is not a valid host."))

    def _check_framing(self) -> None:
        """Refuse bodies whose length is unknown or above the limit."""
        transfer_encoding = self._headers.get("transfer-encoding")
        if transfer_encoding is not None:
            if self._version == "1.0":
                self._refuse(InvalidRequestError("HTTP/1.0 has no Transfer-Encoding."))
            if transfer_encoding.lower() != "chunked":
                self._refuse(
                    UnsupportedHttpError(
                        f"The transfer encoding {transfer_encoding[:100]!r} is not served here."
                    )
                )
            return
        digits = self._headers.get("content-length", "0")
        if len(digits) > 20:  # llhttp lets leading zeros pass, int() does not let too many
            self._refuse(InvalidRequestError("The Content-Length has too many digits."))
        if int(digits) > self._limits.max_body_bytes:
            self._refuse(self._body_too_large())

    @staticmethod
    def _origin_form(target: bytes) -> bytes:
        """The path and query of a target that was checked."""
        match = _ABSOLUTE_TARGET.fullmatch(target)
        if match is None:
            return target
        rest = match["rest"]
        return rest if rest.startswith(b"/") else b"/" + rest

    def _headers_too_large(self) -> GraphLLMError:
        return HeadersTooLargeError(
            f"The request line and headers are above the limits here: {self._limits.max_headers} headers, "
            f"{self._limits.max_header_bytes} bytes in all."
        )

    def _body_too_large(self) -> GraphLLMError:
        return PayloadTooLargeError(
            f"The request body is larger than {self._limits.max_body_bytes} bytes, the limit here."
        )

    def _refuse(self, error: GraphLLMError) -> NoReturn:
        self.error = error
        raise _StopParsingError
