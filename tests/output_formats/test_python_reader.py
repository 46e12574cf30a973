"""Python's literals come out as the JSON of the same value: `ast.literal_eval` is the judge."""

from __future__ import annotations

import ast
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphllm.output_formats.python_reader import PythonValue, word_as_json

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


def convert(text: str, size: int) -> tuple[str, bool]:
    value = PythonValue()
    out: list[str] = []
    rest = ""
    for start in range(0, len(text), size):
        rest += text[start : start + size]
        rest = rest[value.read(rest, 0, out, is_last=False) :]
    value.read(rest, 0, out, is_last=True)
    return "".join(out), value.is_done


def as_json(value: object) -> object:
    """The value with its tuples as lists."""
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    return value


@settings(max_examples=300, deadline=None)
@given(VALUES, st.integers(1, 9))
def test_what_repr_writes_is_read(value: object, size: int) -> None:
    converted, is_done = convert(repr(value) + " ", size)
    assert is_done
    assert json.loads(converted) == as_json(value)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                *r"abé'",
                '"',
                "\n",
                r"\n",
                r"\\",
                r"\'",
                r"\"",
                r"\x41",
                r"\u00e9",
                r"\U0001f600",
                r"\7",
                r"\101",
                r"\q",
            ]
        )
    ),
    st.sampled_from(["'''", '"""']),
    st.integers(1, 9),
)
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_strings_are_read_as_python_reads_them(parts: list[str], quote: str, size: int) -> None:
    literal = quote + "".join(parts).replace(quote, "") + quote
    try:
        expected = ast.literal_eval(literal)
    except SyntaxError:
        # A quote before the last three.
        return
    if quote in "".join(parts):
        return
    converted, is_done = convert(literal, size)
    assert is_done
    assert json.loads(converted) == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        *(("1_000", "1000"), ("+3", "3"), (".5", "0.5"), ("-.5", "-0.5"), ("5.", "5.0"), ("1.e3", "1.0e3")),
        *(("0xFF", "255"), ("True", "true"), ("null", "null"), ("007", None), ("1.2.3", None), ("x", None)),
        *(("inf", None), ("1e", None), ("--1", None), ("0x", None), ("0x" + "f" * 65, None), ("٣", None)),
    ],
)
def test_words(word: str, expected: str | None) -> None:
    assert word_as_json(word) == expected


@pytest.mark.parametrize(
    "text",
    [
        "[,]",
        "{1: 2}",
        "{'a'}",
        "{'a': }",
        "{'a': 1 'b'}",
        "[1 2]",
        "(1]",
        "f(x)",
        "a",
        "'\\xg1'",
        "*",
        "{'a',}",
    ],
)
def test_what_is_no_literal_breaks(text: str) -> None:
    assert not convert(text + " ", 3)[1]
