"""Reading what stands around calls: markers, lists, separators.

Owns the order of calls and the text between them, from where an envelope opened to where it is over. What a
call is is the call readers'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphllm.output_formats.call_readers import (
    CallReader,
    JsonCallReader,
    Progress,
)
from graphllm.output_formats.markers import BLANKS, end_of_blanks, markers
from graphllm.output_formats.named_call_reader import NamedJsonCallReader
from graphllm.output_formats.output import EventList
from graphllm.output_formats.parameter_reader import ParameterCallReader
from graphllm.output_formats.python_reader import PythonCallReader
from graphllm.output_formats.syntax import (
    CallSyntax,
    Envelope,
    JsonCall,
    ListUse,
    NamedJsonCall,
    ParameterCall,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to write calls, in one of its envelopes."""

    syntax: CallSyntax
    envelope: Envelope

    @property
    def call_start(self) -> str:
        """The text that a call begins with; "" where that is a name."""
        return self.syntax.begin or ("{" if isinstance(self.syntax.body, JsonCall) else "")

    @property
    def first_texts(self) -> tuple[str, ...]:
        """What may come first in the envelope; "" among them where a name may."""
        uses = self.syntax.list_use
        in_list = () if uses is ListUse.NEVER else ("[",)
        return in_list if uses is ListUse.ALWAYS else (*in_list, self.call_start)

    @property
    def followers(self) -> Mapping[str, str]:
        """The characters that may stand behind the brackets that open a bare envelope."""
        is_bare = isinstance(self.syntax.body, JsonCall) and not self.envelope.begin and not self.syntax.begin
        return {"{": f'"{BLANKS}', "[": f"{{{BLANKS}"} if is_bare else {}

    @property
    def closing_texts(self) -> tuple[str, ...]:
        """What may come behind a call that belongs to it; blanks before it are no matter."""
        return tuple(closer.strip() for closer in (*self.syntax.closers, *self.syntax.other_closers))

    @property
    def opening_texts(self) -> tuple[str, ...]:
        """What the envelope is known by: the text around calls, or where there is none what comes first."""
        return (self.envelope.begin,) if self.envelope.begin else self.first_texts


def new_reader(syntax: CallSyntax, events: EventList) -> CallReader:
    body = syntax.body
    if isinstance(body, JsonCall):
        return JsonCallReader(body, events)
    if isinstance(body, NamedJsonCall):
        return NamedJsonCallReader(body, events)
    if isinstance(body, ParameterCall):
        return ParameterCallReader(body, events)
    return PythonCallReader(events)


class EnvelopeReader:
    """Reads the calls of one envelope, from behind the text that opened it.

    pending: text read since the last call that belongs to none yet. When the envelope `is_over`, it and what
    comes next are text; `open_depth` is then the number of JSON brackets to be passed over first.
    """

    __slots__ = (
        "_events",
        "_is_in_list",
        "_phase",
        "_plan",
        "_plans",
        "_reader",
        "is_over",
        "open_depth",
        "pending",
    )

    def __init__(self, plans: Sequence[Plan], events: EventList, opening: str) -> None:
        """plans: those that what was read so far, `opening`, leaves open."""
        self.pending = [opening] if opening else []
        self.is_over = False
        self.open_depth = 0
        self._plans = plans
        self._plan = plans[0]
        self._events = events
        self._phase = "opened"
        self._is_in_list = False
        self._reader: CallReader | None = None

    def begin_with(self, reader: CallReader) -> None:
        """The first call has begun already, and `reader` reads it."""
        self._reader = reader
        self._phase = "call"

    def read(self, text: str, position: int, *, is_last: bool) -> int:
        """Reads on; gives the place behind what was read."""
        while position < len(text) and not self.is_over:
            before, phase = position, self._phase
            if phase == "call":
                position = self._read_call(text, position, is_last=is_last)
            else:
                position = end_of_blanks(text, position)
                if position > before:
                    self.pending.append(text[before:position])
                if position < len(text):
                    position = self._read_between(text, position, is_last=is_last)
            if position == before and self._phase == phase:
                break
        return position

    def finish(self) -> None:
        """No more text comes: a call that was announced ends, whatever it lacks."""
        if self._reader is not None and self._reader.has_started:
            self._events.end_call()
        self.is_over = True

    def _read_call(self, text: str, position: int, *, is_last: bool) -> int:
        reader = self._reader
        assert reader is not None
        end = reader.read(text, position, is_last=is_last)
        if reader.has_started:
            self.pending = []
        elif end > position:
            self.pending.append(text[position:end])
        if reader.progress is Progress.DONE:
            self._reader = None
            self._phase = "after"
        elif reader.progress is Progress.BROKEN:
            self.finish()
            self.open_depth = reader.open_depth and reader.open_depth + self._is_in_list
        return end

    def _read_between(self, text: str, position: int, *, is_last: bool) -> int:
        expected = self._expected()
        found = markers(*expected).at(text, position, is_last=is_last)
        if found == "":
            return position
        if found is None:
            if "" in expected:
                self._begin_call("")
            else:
                self.is_over = True
            return position
        if self._phase == "after" and found in (*self._plan.closing_texts, self._plan.envelope.end, "]"):
            # What belongs to the calls is no text.
            self.pending = []
            self._is_in_list = self._is_in_list and found != "]"
            self.is_over = found == self._plan.envelope.end
            return position + len(found)
        self.pending.append(found)
        if found == "[":
            self._plan = next(plan for plan in self._plans if "[" in plan.first_texts)
            self._is_in_list = True
            self._phase = "next"
        elif self._phase == "after" and found in (self._plan.syntax.separator.strip(), ","):
            self._phase = "next"
        else:
            self._begin_call(found)
            if isinstance(self._plan.syntax.body, JsonCall):
                # Its bracket is part of the call.
                self.pending.pop()
                return position
        return position + len(found)

    def _expected(self) -> tuple[str, ...]:
        """The texts that may come now; "" among them where a name may, and any other text is none."""
        if self._phase == "opened":
            return tuple(first for plan in self._plans for first in plan.first_texts)
        start = self._plan.call_start
        if self._phase == "next":
            return (start,)
        syntax, envelope = self._plan.syntax, self._plan.envelope
        in_list = (",", "]") if self._is_in_list else ()
        between = (*self._plan.closing_texts, *in_list, syntax.separator.strip(), start, envelope.end)
        # Where the envelope's end is marked, a name may stand before it.
        return (*filter(None, between), *([""] if envelope.end and not start else []))

    def _begin_call(self, found: str) -> None:
        if self._phase == "opened":
            self._plan = next(plan for plan in self._plans if found in plan.first_texts)
        self._reader = new_reader(self._plan.syntax, self._events)
        self._phase = "call"
