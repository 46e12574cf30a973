"""Responses that run without a connection, and the events that they keep for clients who come back.

Owns the run, its cancellation and its event log. Where the result goes is the store's.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphllm.errors import GraphLLMError, InvalidRequestError
from graphllm.server import sse
from graphllm.server.generation.choices import ChoiceReader, Piece
from graphllm.server.generation.framing import ReplyFramer
from graphllm.server.generation.replies import Reply, RequestEngine
from graphllm.server.http import Response
from graphllm.server.openai.responses.store import ResponseStore, StoredResponse
from graphllm.server.openai.responses.wire import ResponsesWire

# Events above this are not kept: the response still ends well, but its stream cannot be taken up again.
MAX_LOG_BYTES = 4 * 1024**2
_EVENT_END = b"\n\n"


class EventLog:
    """The events of one stream, and the clients that follow it.

    What has been logged goes to a new follower at once, what comes later as it comes.
    """

    def __init__(self, *, max_bytes: int = MAX_LOG_BYTES) -> None:
        self._max_bytes = max_bytes
        self._chunks: list[bytes] = []
        # (the follower's answer, how many events it does not want)
        self._followers: list[tuple[Response, int]] = []
        self._is_whole = True
        self._has_ended = False
        self.num_bytes = 0

    def append(self, data: bytes) -> None:
        """`data`: whole events."""
        if not data:
            return
        if self._is_whole:
            self._chunks.append(data)
            self.num_bytes += len(data)
            if self.num_bytes > self._max_bytes:
                self._is_whole = False
                self._chunks.clear()
                self.num_bytes = 0
        self._followers = [
            (response, _send(response, data, num_skipped))
            for response, num_skipped in self._followers
            if response.is_open
        ]

    def end(self) -> None:
        self._has_ended = True
        for response, _ in self._followers:
            response.end_stream()
        self._followers.clear()

    def cut(self) -> None:
        """End without a last event: the response is gone."""
        for response, _ in self._followers:
            response.abort_stream()
        self._followers.clear()

    def follow(
        self, response: Response, *, starting_after: int, headers: tuple[tuple[str, str], ...]
    ) -> None:
        """Stream the events whose number is above `starting_after`.

        Raises InvalidRequestError when they are not kept.
        """
        if not self._is_whole:
            raise InvalidRequestError(
                "The events of this response were too many to be kept; retrieve it without 'stream'.",
                param="stream",
            )
        response.start_stream(content_type=sse.CONTENT_TYPE, headers=headers)
        num_skipped = _send(response, b"".join(self._chunks), starting_after + 1)
        if self._has_ended:
            response.end_stream()
        else:
            self._followers.append((response, num_skipped))


def _send(response: Response, data: bytes, num_skipped: int) -> int:
    """Send all events of `data` but the first `num_skipped`; returns how many are still to be skipped."""
    if num_skipped and data:
        events = data.split(_EVENT_END)[:-1]
        data = b"".join(event + _EVENT_END for event in events[num_skipped:])
        num_skipped = max(0, num_skipped - len(events))
    response.write_chunk(data)
    return num_skipped


@dataclass(slots=True, eq=False)
class BackgroundTask:
    """What the store keeps of a background response's making: the reply until it ends, and the log.

    log: None where nobody asked for a stream.
    """

    log: EventLog | None
    reply: BackgroundReply | None = None

    @property
    def is_running(self) -> bool:
        return self.reply is not None and self.reply.is_running

    @property
    def num_log_bytes(self) -> int:
        return 0 if self.log is None else self.log.num_bytes

    def cancel(self) -> None:
        """Stop generating; what there is of the response is recorded. Nothing where it has ended."""
        if self.reply is not None:
            self.reply.cancel()

    def discard(self) -> None:
        """The response was deleted: stop, and record nothing."""
        if self.reply is not None:
            self.reply.abandon()
        if self.log is not None:
            self.log.cut()


class StoreEntry:
    """The stored side of a response while it runs. begun: the head of its object from its first token on."""

    def __init__(self, store: ResponseStore, stored: StoredResponse, *, begun: bytes) -> None:
        self._store = store
        self._stored = stored
        self._begun = begun

    def begin(self) -> None:
        self._stored.head = self._begun
        self.changed()

    def changed(self) -> None:
        self._store.changed(self._stored)

    def record(self, head: bytes, output: bytes) -> None:
        """The response has ended so."""
        self._stored.head = head
        self._stored.turn.output_items = output
        self.changed()


class BackgroundReply(Reply):
    """Generates a response for the store, and its events for the task's log if it has one."""

    def __init__(
        self, engine: RequestEngine, wire: ResponsesWire, *, task: BackgroundTask, entry: StoreEntry
    ) -> None:
        super().__init__(engine, wire)
        self._response_wire = wire
        self._framer = ReplyFramer(wire, self.meter.usage) if task.log is not None else None
        self._task = task
        self._entry = entry
        self._has_begun = False

    @property
    def is_running(self) -> bool:
        return self._is_open

    def cancel(self) -> None:
        if not self._is_open:
            return
        self.abandon()
        self._end(self._response_wire.cancelled(self.choices, self.usage()))

    def flush(self) -> None:
        if not self._is_open:
            return
        has_grown = self._log_frames()
        if not self._has_begun:
            self._has_begun = True
            self._entry.begin()
        elif has_grown:
            self._entry.changed()

    def _write_pieces(self, reader: ChoiceReader, pieces: list[Piece]) -> None:
        if self._framer is not None:
            self._framer.add(reader.choice, pieces)

    def _complete(self) -> None:
        if self._framer is not None:
            self._framer.end(self.choices)
        else:
            self._wire.whole(self.choices, self.usage())  # which records it
        self._end(b"")

    def _send_failure(self, error: GraphLLMError) -> None:
        self._end(self._response_wire.failure(error))

    def _log_frames(self) -> bool:
        data = b"" if self._framer is None else self._framer.take()
        if self._task.log is not None:
            self._task.log.append(data)
        return bool(data)

    def _end(self, last: bytes) -> None:
        """The response is recorded: its last events, and nothing of its making stays in memory."""
        self._log_frames()
        if self._task.log is not None:
            self._task.log.append(last)
            self._task.log.end()
        self._task.reply = None
        self._entry.changed()
