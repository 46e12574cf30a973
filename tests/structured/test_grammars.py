"""Grammars of clients and of output formats: Lark, GBNF, and what stands for something else in them."""

from __future__ import annotations

import json
import re

import pytest

from graphllm.errors import InvalidRequestError
from graphllm.structured.gbnf import gbnf_to_lark, is_gbnf
from graphllm.structured_outputs import StructuredOutputs
from tests.structured.conftest import Bench

JSON_GBNF = r"""
# llama.cpp's grammar of JSON, in our words
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( pair ("," ws pair)* )? "}" ws
pair   ::= string ":" ws value
array  ::=
  "[" ws (
    value
    ("," ws value)*
  )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u00" [0-7] [0-9a-fA-F]) )* "\"" ws
number ::= "-"? ([0-9] | [1-9] [0-9]{0,5}) ("." [0-9]+)? ws
ws     ::= | " " | "\n" [ \t]{0,8}
"""


def test_gbnf_s_json_is_json(bench: Bench) -> None:
    for seed in range(40):
        walk = bench.walk(StructuredOutputs(grammar=JSON_GBNF), seed)
        walk.run(40)
        walk.complete()
        assert isinstance(json.loads(walk.output.decode()), dict)


GBNF_PATTERNS = {
    'root ::= "a" [b-d]* "x"?': r"a[b-d]*x?",
    'root ::= [^a-z\\n\\]"] "\\x41\\u00e9\\U0001F600"': '[^a-z\\n\\]"]Aé\U0001f600',
    'root ::= ("ab" | [0-9]{2,3}) tail\ntail ::= "-" | ""': r"(ab|[0-9]{2,3})-?",
    'root ::= item{2}  # twice\nitem ::= "x" | "y"\n': r"[xy]{2}",
    'root ::= "a" |\n  "b" |\n  "c"': r"[abc]",
    'root ::= "a"\n  | "b"': r"[ab]",
    "root ::= [-a] [a-] [/.^]": r"[-a][a-][/.^]",
    'root ::= . "a"': r"(?s:.)a",
    'root ::= a-b\na-b ::= "q"': r"q",
    'root ::= "(" root ")" | [0-9]{1,2}': r"\(*[0-9]{1,2}\)*",
    'root ::= "n" [0-9]{0,2} list\nlist ::= "" | "," [a-z]* list': r"n[0-9]{0,2}(,[a-z]*)*",
}


@pytest.mark.parametrize(("grammar", "pattern"), GBNF_PATTERNS.items())
def test_gbnf_means_what_the_pattern_means(grammar: str, pattern: str, byte_level: Bench) -> None:
    for seed in range(15):
        walk = byte_level.walk(StructuredOutputs(grammar=grammar), seed)
        walk.run(10)
        walk.complete()
        assert re.fullmatch(pattern, walk.output.decode())


BROKEN_GBNF = {
    'rute ::= "a"': "no rule named root",
    "root ::= other": "line 1: 'other' is not defined",
    'root ::= "a"\nroot ::= "b"': "line 2: 'root' is defined twice",
    'root ::= ("a"': "not closed",
    'root ::= "a")': "not opened",
    "root ::= *": "nothing for '*' to repeat",
    'root ::= "\\q"': "escape \\q",
    'root ::= "\\ud800"': "no character U+D800",
    "root ::= []": "empty",
    'root ::= "a': "not understood",
    'root ::= "a"\n"b"': "belongs to no rule",
    'root ::= ("a"\nb ::= "c"': "while a group is open",
}


@pytest.mark.parametrize(("grammar", "words"), BROKEN_GBNF.items())
def test_broken_gbnf_is_refused_with_its_line(grammar: str, words: str, byte_level: Bench) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        byte_level.compiler.compile(StructuredOutputs(grammar=grammar))
    assert words in caught.value.message
    assert caught.value.param == "structured_outputs"


def test_gbnf_and_lark_are_told_apart() -> None:
    assert is_gbnf('# comment\n\nroot ::= "a"')
    assert not is_gbnf('start: "root ::= x"')


def test_rules_without_a_way_back_become_terminals() -> None:
    lark = gbnf_to_lark('root ::= "(" root ")" | word\nword ::= letter+\nletter ::= [a-z]')
    assert re.search(r"^T\d+: .*// word$", lark, re.MULTILINE)
    assert re.search(r"^r\d+: .*// root$", lark, re.MULTILINE)


REFUSED_LARK = {
    'root: "a"': "no start rule",
    "start: x": "unknown name",
    'start: "a" "': "lexer error",
    "start: @other": "refers to another grammar",
    'start: %lark { start: "a" }': "refers to another grammar",
    '{"grammars":[{"json_schema":{}}]}': "expecting rule",
    "start: <nope>": "unknown special token",
    'start: %json {"type": "frog"}': "frog",
    'start: %json {"type": }': "line 1",
    'start: "a"\nb: %json {"x-guidance": {}}': "x-guidance",
    "start: start": "no text",
    'start: ""': "no text but the empty one",
    "start: /a{1,100000}/": "100000 times",
    'start: ("a"{1,1000}){1,1000}': "1000000 times",
    "start: " + "(" * 60 + '"a"' + ")" * 60: "groups within groups",
    "start: " + "(" * 47 + '"a"' + ")" * 47: "nested",
    "start: " + '"a" ' * 3_000: "too large",
    f'start: "{"a" * 5_000}"': "literal of more than",
    "start: A\nA: A": "circular",
    "start: T0\n" + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(40)) + '\nT40: "x"': "too big",
    "start: r0\n"
    + "\n".join(f"r{i}: r{i + 1}{{0,100}}" for i in range(30))
    + '\nr30: "x"|""': "Too many items",
}


@pytest.mark.parametrize(("grammar", "words"), REFUSED_LARK.items())
def test_lark_is_refused_by_name(grammar: str, words: str, byte_level: Bench) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        byte_level.compiler.compile(StructuredOutputs(grammar=grammar))
    assert words in caught.value.message
    assert caught.value.param == "structured_outputs"


CALLS = r"""
start: call ("\n" call)*
call: %marker "<s>" "{\"name\": \"f\", \"arguments\": " arguments "}" %marker "</call>"
arguments: %json {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}},
  "required": ["n"], "additionalProperties": false}
"""


def test_marker_is_the_special_token_where_there_is_one_and_text_elsewhere(byte_level: Bench) -> None:
    marker = byte_level.id_of("<s>")
    for seed in range(10):
        walk = byte_level.walk(StructuredOutputs(grammar=CALLS), seed)
        walk.run(200)
        walk.complete()
        calls = walk.output.decode().split("</call>\n")
        calls[-1] = calls[-1].removesuffix("</call>")
        assert walk.token_ids.count(marker) == len(calls)
        for call in calls:
            assert call.startswith("<s>")
            arguments = json.loads(call.removeprefix("<s>"))["arguments"]
            assert 0 <= arguments["n"] <= 99


def test_schema_in_a_grammar_has_the_whitespace_rule(byte_level: Bench) -> None:
    structured = StructuredOutputs(grammar='start: "=" %json {"const": [1, 2]}', whitespace_pattern=" ?")
    outputs = set()
    for seed in range(20):
        walk = byte_level.walk(structured, seed)
        walk.complete()
        outputs.add(walk.output)
    assert all(re.fullmatch(rb"=\[ ?1 ?, ?2 ?\]", output) for output in outputs)


def test_strings_and_comments_that_look_like_more_are_left_alone(byte_level: Bench) -> None:
    grammar = '# %json {\nstart: "%json {" /[")]/ "%marker \\"<s>\\"" // @other (((( "'
    walk = byte_level.walk(StructuredOutputs(grammar=grammar))
    walk.complete()
    assert walk.output.decode() in ('%json {"%marker "<s>"', '%json {)%marker "<s>"')


REFUSED_PATTERNS = {
    "a" * 3_000: "3000 characters",
    "(" * 60 + "a" + ")" * 60: "groups within groups",
    "((a{1,30}){1,30}){1,30}": "27000 times",
    "a{99999999999}": "1000000000 times",
    "(?=a)b": "look-around",
    r"(a)\1": "backreferences",
    "[": "unclosed",
    r"[^\s\S]": "no text",
    r"\p{Greek}" * 200: "too large",
}


@pytest.mark.parametrize(("pattern", "words"), REFUSED_PATTERNS.items())
def test_pattern_is_refused_by_name(pattern: str, words: str, byte_level: Bench) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        byte_level.compiler.compile(StructuredOutputs(regex=pattern))
    assert words in caught.value.message


@pytest.mark.parametrize(
    "pattern", ["[^\\]]{3}", "\\(\\)\\{9999999\\}", "[(]{9}", "(?:ab)+", "^a$", "x{2,}?"]
)
def test_harmless_pattern_is_accepted(pattern: str, byte_level: Bench) -> None:
    walk = byte_level.walk(StructuredOutputs(regex=pattern))
    walk.run(20)
    walk.complete()
    assert re.fullmatch(pattern, walk.output.decode())


@pytest.mark.parametrize("pattern", [".*", "a", "[^x]", "\\w", "\\d", " {1,9999}", "(?=x)", "\\S"])
def test_whitespace_pattern_of_anything_else_is_refused(pattern: str, byte_level: Bench) -> None:
    with pytest.raises(InvalidRequestError, match="whitespace_pattern"):
        byte_level.compiler.compile(StructuredOutputs(json={}, whitespace_pattern=pattern))


def test_choices_are_bounded(byte_level: Bench) -> None:
    for choice, words in (
        (tuple(map(str, range(1_001))), "1001 texts"),
        (("x" * 5_000,), "4096 bytes"),
        (("a", ""), "empty text"),
        (tuple(f"{i}" + "x" * 4_000 for i in range(20)), "bytes"),
    ):
        with pytest.raises(InvalidRequestError, match=words):
            byte_level.compiler.compile(StructuredOutputs(choice=choice))
