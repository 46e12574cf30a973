"""The scanner takes for JSON what RFC 8259 does, and says where it ends, in pieces of any size."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphllm.output_formats.json_scanner import MAX_DEPTH, BracketCounter, JsonScanner, is_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def is_json_of_python(text: str) -> bool:
    def refuse(word: str) -> None:
        raise ValueError(word)

    try:
        json.loads(text.strip(" \t\r\n"), parse_constant=refuse)
    except ValueError:
        return False
    return True


def scan(text: str, size: int, *, is_strict: bool = False) -> tuple[str, int, JsonScanner]:
    scanner = JsonScanner(is_strict=is_strict)
    out: list[str] = []
    read = 0
    for start in range(0, len(text), size):
        piece = text[start : start + size]
        end = scanner.read(piece, 0, out)
        read += end
        if end < len(piece):
            break
    return "".join(out), read, scanner


@settings(deadline=None)
@given(VALUES, st.integers(1, 7), st.sampled_from([None, 1]))
def test_a_value_comes_out_as_it_was_written_and_ends_where_it_ends(
    value: object, size: int, indent: int | None
) -> None:
    written = json.dumps([value], indent=indent)
    out, read, scanner = scan(written + ' ,"more', size)
    assert scanner.is_done
    assert (out, read) == (written, len(written))


@settings(max_examples=400, deadline=None)
@given(VALUES, st.data())
def test_damaged_json_is_judged_as_python_judges_it(value: object, data: st.DataObject) -> None:
    written = json.dumps(value, ensure_ascii=data.draw(st.booleans()))
    place = data.draw(st.integers(0, len(written)))
    inserted = data.draw(st.sampled_from(["", *'{}[]",:\\0.e-+ tn\n\x00', "1", "u12", "NaN"]))
    damaged = written[:place] + inserted + written[place + data.draw(st.integers(0, 2)) :]
    assert is_json(damaged) == is_json_of_python(damaged)


@pytest.mark.parametrize(
    "text",
    ["01", "1.", ".5", "+1", "-", "1e", "1e+", "nul", "tru", "'a'", "{a: 1}", "[1,]", '{"a":1,}', "NaN", ""],
)
def test_no_json(text: str) -> None:
    assert not is_json(text)
    assert not is_json_of_python(text)


@pytest.mark.parametrize("text", ["0", "-0", "1.5e-3", "1E+2", "true", '"\\ud800"', " [ ] ", '{"a":{}}'])
def test_json(text: str) -> None:
    assert is_json(text)


def test_a_raw_control_character_is_escaped_or_breaks() -> None:
    out, _, scanner = scan('"a\nb\x01"', 2)
    assert scanner.is_done
    assert json.loads(out) == "a\nb\x01"
    _, read, scanner = scan('"a\nb"', 2, is_strict=True)
    assert scanner.is_broken
    assert read == 2


def test_depth_is_bounded() -> None:
    assert is_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert not is_json("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


@settings(deadline=None)
@given(VALUES, st.integers(1, 7))
def test_the_rest_of_a_value_is_passed_over(value: object, size: int) -> None:
    written = json.dumps({"a": value})[1:]
    counter = BracketCounter(1)
    text = written + "more}"
    read = 0
    for start in range(0, len(text), size):
        read += counter.read(text[start : start + size], 0)
        if counter.is_over:
            break
    assert read == len(written)


def test_passing_over_gives_up_at_a_line_break_in_a_string() -> None:
    counter = BracketCounter(1)
    assert counter.read('"a\n}', 0) == 3
    assert counter.is_over
