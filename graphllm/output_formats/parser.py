"""The one parser of what models write, driven by a format's description.

Owns what is answer, what is reasoning and where calls begin. Time and memory are linear in the text: what
turned out to be no call is text and is not looked at again. Held back is only what may yet begin a marker,
blanks that may stand before a call, and a call whose name is not known yet.

Decisions, where the field knows several ways:
- Blanks before a call, between calls and after the last are dropped; behind a call they are kept where text
  stood before and more follows. Blanks around reasoning are dropped. All else passes unchanged.
- What looks like a call but is none (broken JSON, an unknown tool) is text, as it was written. A call that
  was announced before it broke, or was cut off, ends with the arguments that came; what follows is text.
- Reasoning that is not to be told apart is text with its markers, and is not searched for calls either way.
- Where reasoning comes in several parts, a line break is put between them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from graphllm.output_formats.envelope_reader import EnvelopeReader, Plan
from graphllm.output_formats.events import OutputEvent, TextDelta
from graphllm.output_formats.json_scanner import BracketCounter
from graphllm.output_formats.markers import BLANKS, Markers, end_of_blanks, markers
from graphllm.output_formats.named_call_reader import NamedJsonCallReader
from graphllm.output_formats.output import EventList, Tools
from graphllm.output_formats.syntax import (
    Anchor,
    CallSyntax,
    Envelope,
    MessageSyntax,
    NamedJsonCall,
    NameText,
    ReasoningSyntax,
)

MAX_HEADER_CHARS = 400
"""Most characters of a message's header; what is longer is none."""

_HEADER_WORD = re.compile(r"[^\s<]*")


@dataclass(frozen=True, slots=True)
class Reading:
    """What a parser looks for. at_start: markers that may begin the reply; later: those behind that."""

    plans: tuple[Plan, ...]
    message_plan: Plan | None
    reasoning: ReasoningSyntax | None
    messages: MessageSyntax | None
    separates_reasoning: bool
    at_start: Markers
    later: Markers
    in_line: frozenset[str]
    """Openings that count only where nothing but blanks stands before them in their line."""
    followers: Mapping[str, str]
    """Characters that alone may stand behind an opening: most brackets in a text open no call."""


@lru_cache(maxsize=128)
def reading_of(
    calls: tuple[CallSyntax, ...],
    reasoning: ReasoningSyntax | None,
    *,
    messages: MessageSyntax | None,
    parses_tools: bool,
    parses_reasoning: bool,
) -> Reading:
    """What to look for in a format; made once for all requests alike."""
    if not parses_tools and not parses_reasoning:
        # Reasoning that nobody wants apart matters only because calls in it don't count.
        reasoning, messages = None, None
    plans = tuple(Plan(syntax, envelope) for syntax in calls for envelope in syntax.envelopes)
    plans = plans if parses_tools else ()
    begins = () if reasoning is None else reasoning.begins
    anywhere = begins if reasoning is not None and reasoning.is_anywhere else ()
    message_marks = () if messages is None else (*messages.header_begins, *messages.body_ends)
    recipient = () if messages is None else (messages.recipient_mark,)
    openings = [(opening, plan.envelope.anchor) for plan in plans for opening in plan.opening_texts]
    later = [opening for opening, anchor in openings if anchor is not Anchor.REPLY]
    return Reading(
        plans=plans,
        message_plan=_message_plan(messages) if messages is not None and parses_tools else None,
        reasoning=reasoning,
        messages=messages,
        separates_reasoning=parses_reasoning,
        at_start=markers(*begins, *message_marks, *recipient, *(opening for opening, _ in openings)),
        later=markers(*anywhere, *message_marks, *later),
        in_line=frozenset(opening for opening, anchor in openings if anchor is Anchor.LINE),
        followers={opening: plan.followers[opening] for plan in plans for opening in plan.followers},
    )


def _message_plan(messages: MessageSyntax) -> Plan:
    """A call as the body of a message: JSON, then what ends bodies. Its name is in the header."""
    name = NameText(ends=(messages.header_end,))
    return Plan(CallSyntax(NamedJsonCall(name), (Envelope(),), closers=messages.body_ends), Envelope())


@dataclass(frozen=True, slots=True)
class _Section:
    """Text up to a marker that is not looked at closer: reasoning, or what is given on word for word."""

    ends: Markers
    stops: frozenset[str]
    is_reasoning: bool


class StreamingParser:
    """Reads one reply; see events.OutputParser."""

    __slots__ = (
        "_at_start",
        "_blanks",
        "_envelope",
        "_events",
        "_has_reasoned",
        "_has_text",
        "_header",
        "_holds_blanks",
        "_is_after_call",
        "_is_line_blank",
        "_is_set_apart",
        "_passed",
        "_reading",
        "_reasoning_blanks",
        "_rest",
        "_section",
        "_section_has_text",
        "_state",
    )

    def __init__(self, reading: Reading, tools: Tools | None, *, starts_in_reasoning: bool) -> None:
        """tools: None where any name may be called. starts_in_reasoning: the prompt ends inside reasoning."""
        self._reading = reading
        self._events = EventList(tools)
        self._rest = ""
        self._state: Callable[[str, int, bool], int] = self._read_text
        self._at_start = True
        self._is_line_blank = True
        self._has_text = False
        self._is_after_call = False
        # Blanks that are dropped if a call comes next.
        self._blanks: list[str] = []
        self._holds_blanks = bool(reading.plans or reading.message_plan)
        self._envelope: EnvelopeReader | None = None
        self._header: list[str] = []
        self._passed = BracketCounter(0)
        self._section: _Section | None = None
        self._reasoning_blanks: list[str] = []
        self._section_has_text = False
        self._has_reasoned = False
        self._is_set_apart = False
        if starts_in_reasoning and reading.reasoning is not None:
            self._begin_reasoning(reading.reasoning)
            self._state = self._read_repeated_begin

    def append(self, text: str) -> list[OutputEvent]:
        """What `text` says; see OutputParser."""
        if (
            self._state == self._read_text
            and self._has_text
            and not (self._at_start or self._rest or self._blanks or self._is_after_call)
            and text
            and self._reading.later.cannot_begin_in(text)
            and not (self._holds_blanks and text[-1] in BLANKS)
        ):
            # Most tokens of most replies. What stands in the line counts only where an opening could come.
            if self._reading.in_line:
                self._note_line(text)
            return [TextDelta(text)]
        self._run(text, is_last=False)
        return self._events.take()

    def finish(self) -> list[OutputEvent]:
        """What was held back; see OutputParser."""
        self._run("", is_last=True)
        if self._envelope is not None:
            self._envelope.finish()
            self._leave_envelope(self._envelope)
        self._give_text("".join(self._header))
        if not self._is_after_call:
            self._flush_blanks()
        return self._events.take()

    def _run(self, text: str, *, is_last: bool) -> None:
        text = self._rest + text
        position = 0
        while position < len(text):
            before, state = position, self._state
            position = state(text, position, is_last)
            if position == before and self._state == state:
                break
        self._rest = text[position:]

    # What each state does with the text from a place on; each gives the place behind what it read.

    def _read_text(self, text: str, position: int, is_last: bool) -> int:
        reading = self._reading
        if self._at_start:
            end = end_of_blanks(text, position)
            if end > position:
                self._hold(text[position:end])
                return end
            found = reading.at_start.at(text, position, is_last=is_last)
            if found == "":
                return position
            self._at_start = False
            if found is not None:
                return self._open(found, position)
        start, found = reading.later.search(text, position, is_last=is_last)
        self._give_text(text[position:start])
        if not found:
            return start
        if self._is_plain(found, text, start):
            self._give_text(found)
            return start + len(found)
        return self._open(found, start)

    def _is_plain(self, found: str, text: str, position: int) -> bool:
        """Whether an opening is none by where it stands, or by the character behind it."""
        if found in self._reading.in_line and not self._is_line_blank:
            return True
        followers = self._reading.followers.get(found)
        behind = position + len(found)
        return followers is not None and behind < len(text) and text[behind] not in followers

    def _open(self, found: str, position: int) -> int:
        """A marker stands at `position`: what begins with it is read from now on."""
        reading = self._reading
        messages, reasoning = reading.messages, reading.reasoning
        if messages is not None and found in messages.body_ends:
            return position + len(found)
        if messages is not None and found in (*messages.header_begins, messages.recipient_mark):
            self._header = [found]
            self._state = self._read_header
            return position + len(found)
        if reasoning is not None and found in reasoning.begins:
            self._begin_reasoning(reasoning)
            if not reading.separates_reasoning:
                self._give_verbatim(found)
            return position + len(found)
        plans = tuple(plan for plan in reading.plans if found in plan.opening_texts)
        opening = plans[0].envelope.begin
        self._envelope = EnvelopeReader(plans, self._events, opening)
        self._state = self._read_envelope
        return position + len(opening)

    def _read_envelope(self, text: str, position: int, is_last: bool) -> int:
        envelope = self._envelope
        assert envelope is not None
        num_calls = self._events.num_calls
        end = envelope.read(text, position, is_last=is_last)
        if self._events.num_calls > num_calls:
            self._blanks = []
            self._is_after_call = True
        if envelope.is_over:
            self._leave_envelope(envelope)
        return end

    def _leave_envelope(self, envelope: EnvelopeReader) -> None:
        self._envelope = None
        self._state = self._read_text
        if envelope.open_depth:
            self._passed = BracketCounter(envelope.open_depth)
            self._state = self._read_passed
        self._give_text("".join(envelope.pending))

    def _read_passed(self, text: str, position: int, is_last: bool) -> int:
        """JSON that is no call: nothing in it is one either."""
        end = self._passed.read(text, position)
        if self._passed.is_over:
            self._state = self._read_text
        self._give_text(text[position:end])
        return end

    def _read_header(self, text: str, position: int, is_last: bool) -> int:
        messages = self._reading.messages
        assert messages is not None
        room = MAX_HEADER_CHARS - sum(map(len, self._header))
        # No farther than a header may reach: it would be looked at again.
        window = text[position : position + room + len(messages.header_end)]
        end, found = markers(messages.header_end).search(window, 0, is_last=is_last)
        end += position
        self._header.append(text[position : min(end, position + room)])
        if end - position <= room and not found:
            return end
        header, self._header = "".join(self._header), []
        self._state = self._read_text
        if end - position > room:
            self._give_text(header)
            return position + room
        self._begin_body(messages, header, found)
        return end + len(found)

    def _begin_body(self, messages: MessageSyntax, header: str, header_end: str) -> None:
        """Decides by a message's header what its body is."""
        reading = self._reading
        channel = _word_after(messages.channel_mark, header)
        recipient = _word_after(messages.recipient_mark, header)
        name = recipient.removeprefix(messages.recipient_lead)
        ends = markers(*messages.body_ends, *messages.header_begins)
        is_reasoning = channel in messages.reasoning_channels
        if reading.message_plan is not None and self._events.may_call(name):
            self._envelope = EnvelopeReader((reading.message_plan,), self._events, header + header_end)
            body = reading.message_plan.syntax.body
            assert isinstance(body, NamedJsonCall)
            self._envelope.begin_with(NamedJsonCallReader(body, self._events, name=name))
            self._state = self._read_envelope
        elif is_reasoning and reading.separates_reasoning:
            self._begin_section(_Section(ends, frozenset(messages.header_begins), is_reasoning=True))
        elif is_reasoning or recipient:
            self._begin_section(_Section(ends, frozenset(messages.header_begins), is_reasoning=False))
            self._give_verbatim(header + header_end)

    def _begin_reasoning(self, reasoning: ReasoningSyntax) -> None:
        stops = reasoning.stops if self._reading.plans else ()
        ends = markers(*reasoning.ends, *stops)
        self._begin_section(_Section(ends, frozenset(stops), is_reasoning=self._reading.separates_reasoning))

    def _begin_section(self, section: _Section) -> None:
        self._section = section
        self._section_has_text = False
        self._reasoning_blanks = []
        self._state = self._read_section

    def _read_repeated_begin(self, text: str, position: int, is_last: bool) -> int:
        """The prompt opened reasoning; some models open it once more."""
        reasoning = self._reading.reasoning
        assert reasoning is not None
        end = end_of_blanks(text, position)
        if end > position:
            self._give_section(text[position:end])
            return end
        found = markers(*reasoning.begins).at(text, position, is_last=is_last)
        if found == "":
            return position
        self._state = self._read_section
        if found is not None and not self._reading.separates_reasoning:
            self._give_verbatim(found)
        return position + len(found or "")

    def _read_section(self, text: str, position: int, is_last: bool) -> int:
        section = self._section
        assert section is not None
        start, found = section.ends.search(text, position, is_last=is_last)
        self._give_section(text[position:start])
        if not found:
            return start
        self._section = None
        self._state = self._read_text
        self._at_start = True
        self._is_line_blank = True
        if found in section.stops:
            return start
        if section.is_reasoning:
            self._is_set_apart = True
        else:
            self._give_verbatim(found)
        return start + len(found)

    # What is given: every character of the reply ends in one of these, in a call, or is a marker.

    def _give_section(self, text: str) -> None:
        assert self._section is not None
        if not self._section.is_reasoning:
            self._give_verbatim(text)
            return
        kept = text.rstrip(BLANKS)
        if kept:
            if not self._section_has_text:
                kept = kept.lstrip(BLANKS)
                self._reasoning_blanks = ["\n"] if self._has_reasoned else []
            self._events.add_reasoning("".join([*self._reasoning_blanks, kept]))
            self._reasoning_blanks = []
            self._section_has_text = self._has_reasoned = True
        self._reasoning_blanks.append(text[len(text.rstrip(BLANKS)) :])

    def _give_verbatim(self, text: str) -> None:
        if text:
            self._flush_blanks()
            self._events.add_text(text)
            self._has_text = True
            self._is_after_call = False

    def _give_text(self, text: str) -> None:
        if self._holds_blanks:
            # Leading blanks are held too, since it depends on what came before whether they count.
            lead = 0 if self._has_text else end_of_blanks(text, 0)
            self._hold(text[:lead])
            kept = text[lead:].rstrip(BLANKS)
            self._give_verbatim(kept)
            self._hold(text[lead + len(kept) :])
        else:
            self._give_verbatim(text)
        if self._reading.in_line:
            self._note_line(text)

    def _hold(self, blanks: str) -> None:
        if blanks:
            self._blanks.append(blanks)

    def _flush_blanks(self) -> None:
        """Blanks that no call followed are text, unless they only set the answer apart."""
        if self._blanks:
            is_apart = bool(self._events.num_calls or self._is_set_apart) and self._reading.messages is None
            if self._has_text or not is_apart:
                self._events.add_text("".join(self._blanks))
            self._blanks = []

    def _note_line(self, text: str) -> None:
        _, line_break, line = text.rpartition("\n")
        self._is_line_blank = not line.strip(BLANKS) and (self._is_line_blank or bool(line_break))


def _word_after(mark: str, header: str) -> str:
    """The word behind the last `mark` in a header; "" where there is none."""
    _, found, rest = header.rpartition(mark)
    word = _HEADER_WORD.match(rest.lstrip(BLANKS)) if found else None
    return "" if word is None else word.group()
