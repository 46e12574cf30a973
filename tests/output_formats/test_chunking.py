"""What a reply says does not depend on the pieces that it comes in, nor on what a model writes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphllm.output_formats import OutputFormat, find_format
from tests.output_formats.replies import TOOLS, events_of, joined, reply_of
from tests.output_formats.samples import SAMPLES

FORMATS = sorted(SAMPLES)
FRAGMENTS = [
    *(
        '{"name": "get_weather", "arguments": {"city": "x"}}',
        '{"name": "get_time"}',
        '{"name": ',
        '"get_time"',
    ),
    *(
        ', "arguments": ',
        '{"a": "b\\n"}',
        '"{\\"a\\": 1}"',
        "get_weather",
        "get_time",
        'city="x"',
        "city",
        "days",
    ),
    *(
        "to=",
        "functions.",
        "assistant",
        "json",
        "analysis",
        "final",
        "commentary",
        "```",
        "0x1F",
        "-1.5",
        "None",
    ),
    *('{}[]()"\\\n ,:=1<a', "é", "😀", "\\u12", "'''", "x" * 300),
]


@st.composite
def hostile_texts(draw: st.DrawFn, output_format: OutputFormat) -> str:
    """Markers and fragments of calls in any order, or a sample with something taken out or put in."""
    fragments = st.sampled_from([*sorted(output_format.marker_texts), *FRAGMENTS]) | st.text(max_size=3)
    if draw(st.booleans()):
        return "".join(draw(st.lists(fragments, max_size=25)))
    written = draw(st.sampled_from([sample.written for sample in SAMPLES[output_format.name].values()]))
    start = draw(st.integers(0, len(written)))
    end = draw(st.integers(start, min(len(written), start + 4)))
    return written[:start] + draw(fragments | st.just("")) + written[end:]


def cut(text: str, draw: st.DrawFn) -> list[str]:
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_do_not_matter(name: str, data: st.DataObject) -> None:
    output_format = find_format(name)
    text = data.draw(hostile_texts(output_format))
    options = {
        "parses_tools": data.draw(st.sampled_from([True, True, True, False])),
        "parses_reasoning": data.draw(st.booleans()),
        "starts_in_reasoning": data.draw(st.sampled_from([False, False, True])),
        "tools": data.draw(st.sampled_from([TOOLS, None])),
    }
    whole = joined(events_of(output_format, [text], **options))
    reply_of(whole)
    assert joined(events_of(output_format, text, **options)) == whole
    assert joined(events_of(output_format, cut(text, data.draw), **options)) == whole


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_text_without_calls_passes_unchanged(name: str, data: st.DataObject) -> None:
    # No tool has a name that the text may spell, so nothing in it is a call.
    output_format = find_format(name)
    text = data.draw(hostile_texts(output_format))
    if output_format.messages is not None:
        # The markers of messages are no text.
        for marker in [*output_format.marker_texts, *output_format.messages.body_ends, "to="]:
            text = text.replace(marker, "")
    events = events_of(
        output_format, cut(text, data.draw), tools={"no such tool": None}, parses_reasoning=False
    )
    assert reply_of(events).text == text


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_reply_may_be_cut_off_anywhere(name: str, data: st.DataObject) -> None:
    sample = data.draw(st.sampled_from(list(SAMPLES[name].values())))
    end = data.draw(st.integers(0, len(sample.written)))
    whole = reply_of(events_of(name, [sample.written]))
    part = reply_of(events_of(name, [sample.written[:end]]))
    assert len(part.calls) <= len(whole.calls)
    for call, complete in zip(part.calls, whole.calls, strict=False):
        assert call.name == complete.name
        assert complete.text.startswith(call.text)
