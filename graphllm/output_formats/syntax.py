"""The words in which a format is described: how calls are written, and how reasoning is set apart.

Owns the vocabulary of descriptions; values only. The descriptions themselves are `formats.py`'s, what
they mean to a reader is `parser.py`'s, and to a writer `grammars.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class Anchor(Enum):
    """Where an envelope may begin."""

    ANYWHERE = auto()
    LINE = auto()
    """First in its line, blanks aside."""
    REPLY = auto()
    """First in the reply, blanks and reasoning aside."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """What stands around one call or several. Empty texts: nothing does."""

    begin: str = ""
    end: str = ""
    anchor: Anchor = Anchor.ANYWHERE


class ListUse(Enum):
    """Whether the calls of an envelope are written as elements of `[...]`."""

    NEVER = auto()
    MAYBE = auto()
    ALWAYS = auto()


@dataclass(frozen=True, slots=True)
class JsonCall:
    """`{"name": "f", "arguments": {...}}`, keys in any order.

    A name may also be an object with both keys in it, as in `{"type": "function", "function": {...}}`. The
    first key of each group is the one that models are told to write. ignores_other_keys: an unknown key does
    not mean that the object is no call; for calls that a marker announces.
    """

    name_keys: tuple[str, ...] = ("name",)
    arguments_keys: tuple[str, ...] = ("arguments", "parameters")
    ignores_other_keys: bool = True


@dataclass(frozen=True, slots=True)
class NameText:
    """A call's name in plain text, up to one of `ends`.

    ends: the first is the one that models write. stops: end a name too, but belong to what follows. leads:
    texts before a name, dropped where they stand; the first is written if `writes_lead`.
    number_mark: text between a name and a number that tells calls apart. is_call_id: all of it, lead and
    number included, is the call's id. id_mark: text after the name, behind which an id stands.
    """

    ends: tuple[str, ...]
    stops: tuple[str, ...] = ()
    leads: tuple[str, ...] = ()
    writes_lead: bool = False
    number_mark: str = ""
    is_call_id: bool = False
    id_mark: str = ""


@dataclass(frozen=True, slots=True)
class NamedJsonCall:
    """A name, then its arguments as a JSON object."""

    name: NameText


@dataclass(frozen=True, slots=True)
class ParameterCall:
    """A name, then each argument between markers: strings as they are, the rest as JSON.

    value_begin: "" where the value follows the key's end at once. end: behind the last argument. trims_line:
    the line breaks right inside a value's markers are not part of it. written_gap: what models
    write between markers; any blanks are read.
    """

    name: NameText
    key_begin: str
    key_end: str
    value_begin: str
    value_end: str
    end: str
    trims_line: bool = False
    written_gap: str = "\n"


@dataclass(frozen=True, slots=True)
class PythonCall:
    """`f(a=1, b="x")`: keyword arguments whose values are Python or JSON literals."""


CallBody = JsonCall | NamedJsonCall | ParameterCall | PythonCall


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """One way to write calls.

    envelopes: the first is the one that models are told to write. begin, closers: before and after each call;
    closers are read in any order and number and written one after another, other_closers are only read.
    separator: between the calls of an envelope, beside what a list has. is_repeated: several calls are
    written as several envelopes, not as one with several calls. writes_list: as a list. written_begin,
    written_end: what models write inside an envelope; written_between: between calls, or envelopes.
    """

    body: CallBody
    envelopes: tuple[Envelope, ...]
    begin: str = ""
    closers: tuple[str, ...] = ()
    other_closers: tuple[str, ...] = ()
    separator: str = ""
    list_use: ListUse = ListUse.NEVER
    is_repeated: bool = False
    writes_list: bool = False
    written_begin: str = ""
    written_between: str = ""
    written_end: str = ""


@dataclass(frozen=True, slots=True)
class ReasoningSyntax:
    """How reasoning is set apart from the answer.

    begins, ends: markers; the first of each is the one that models are told to write. Reasoning begins first
    in a reply only, unless `is_anywhere`. stops: what ends reasoning without being part of its markers.
    """

    begins: tuple[str, ...]
    ends: tuple[str, ...]
    stops: tuple[str, ...] = ()
    is_anywhere: bool = False


@dataclass(frozen=True, slots=True)
class MessageSyntax:
    """Replies that consist of messages with headers, as in OpenAI's harmony format.

    A header begins with one of `header_begins` and ends with `header_end`. Behind `channel_mark` it names the
    channel, behind `recipient_mark` who is called: a function where `recipient_lead` comes before the name.
    Bodies end with one of `body_ends`. reasoning_channels: those whose text is reasoning. written_call: what
    models write before a call's arguments, {name} being the name. written_reasoning: before and behind it.
    """

    header_begins: tuple[str, ...]
    header_end: str
    channel_mark: str
    recipient_mark: str
    recipient_lead: str
    body_ends: tuple[str, ...]
    reasoning_channels: tuple[str, ...]
    written_call: str
    written_reasoning: tuple[str, str]
