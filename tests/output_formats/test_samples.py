"""What models write means what it should, format by format."""

from __future__ import annotations

import pytest

from tests.output_formats.replies import read
from tests.output_formats.samples import CASES, SAMPLES


@pytest.mark.parametrize(("name", "title"), CASES)
def test_sample_is_understood(name: str, title: str) -> None:
    sample = SAMPLES[name][title]
    reply = read(name, sample.written)
    assert [(call.name, call.text) for call in reply.calls] == list(sample.calls)
    assert all(isinstance(call.arguments, dict) for call in reply.calls)
    assert reply.text == sample.text
    assert reply.reasoning == sample.reasoning
    if sample.call_ids:
        assert tuple(call.call_id for call in reply.calls) == sample.call_ids


@pytest.mark.parametrize(("name", "title"), CASES)
def test_sample_is_text_where_neither_tools_nor_reasoning_are_asked_for(name: str, title: str) -> None:
    written = SAMPLES[name][title].written
    reply = read(name, written, parses_tools=False, parses_reasoning=False)
    assert (reply.text, reply.reasoning, reply.calls) == (written, "", [])
