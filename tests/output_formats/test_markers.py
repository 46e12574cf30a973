"""Markers are found wherever they stand, and waited for where they may be beginning."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from graphllm.output_formats.markers import Markers, end_of_blanks, markers

FENCES = Markers(["```", "```json", "<a>"])


def test_the_longer_of_two_markers_is_meant() -> None:
    assert FENCES.search("x```json\n", 0, is_last=False) == (1, "```json")
    assert FENCES.search("x```js\n", 0, is_last=False) == (1, "```")
    assert FENCES.at("```json", 0, is_last=False) == "```json"


def test_a_marker_that_may_grow_is_waited_for() -> None:
    assert FENCES.search("x```js", 0, is_last=False) == (1, "")
    assert FENCES.search("x```js", 0, is_last=True) == (1, "```")
    assert FENCES.at("```", 0, is_last=False) == ""
    assert FENCES.at("```", 0, is_last=True) == "```"


def test_the_beginning_of_a_marker_is_waited_for() -> None:
    assert FENCES.search("x<a", 0, is_last=False) == (1, "")
    assert FENCES.search("x<a", 0, is_last=True) == (3, "")
    assert FENCES.search("<<a", 0, is_last=False) == (1, "")
    assert FENCES.at("<", 0, is_last=False) == ""
    assert FENCES.at("<", 0, is_last=True) is None
    assert FENCES.at("<b", 0, is_last=False) is None


def test_no_markers_are_never_found() -> None:
    none = markers("")
    assert none.search("text", 0, is_last=False) == (4, "")
    assert none.at("text", 0, is_last=False) is None
    assert none.cannot_begin_in("text")


@given(st.text("`json<a>x"), st.integers(0, 5))
def test_search_finds_the_first_marker(text: str, position: int) -> None:
    position = min(position, len(text))
    start, found = FENCES.search(text, position, is_last=True)
    places = [place for marker in FENCES.texts if (place := text.find(marker, position)) >= 0]
    assert start == min(places, default=len(text))
    assert found == next((marker for marker in FENCES.texts if places and text.startswith(marker, start)), "")


@given(st.text("`json<a>x"))
def test_what_is_not_held_back_can_begin_no_marker(text: str) -> None:
    start, found = FENCES.search(text, 0, is_last=False)
    if not found:
        ends = range(start)
        assert not any(marker.startswith(text[end:]) for marker in FENCES.texts for end in ends)


def test_blanks_end_where_text_begins() -> None:
    assert end_of_blanks("a \t\r\nb", 1) == 5
    assert end_of_blanks("a  ", 1) == 3
    assert end_of_blanks("a\u00a0", 1) == 1
