"""Random outputs under a constraint: a finished one is in the language, and a cut one can be finished."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from graphllm.structured_outputs import StructuredOutputs
from tests.structured.conftest import Bench
from tests.structured.languages import random_regex, random_schema

NUM_SCHEMAS = 200
NUM_REGEXES = 120
CHECKED_FORMATS = jsonschema.FormatChecker(["date", "ipv4", "ipv6", "uuid", "email"])


def check_json(output: bytes, schema: dict[str, Any]) -> None:
    """Raises where the output is no JSON in UTF-8, or not valid."""
    value = json.loads(output.decode())
    json.dumps(value, ensure_ascii=False).encode()  # no half of a surrogate pair
    validator = jsonschema.Draft202012Validator(schema, format_checker=CHECKED_FORMATS)
    validator.validate(value)


@pytest.mark.parametrize("seed", range(NUM_SCHEMAS))
def test_finished_json_is_valid_and_cut_json_can_be_finished(
    seed: int, byte_level: Bench, sentencepiece: Bench
) -> None:
    schema = random_schema(seed)
    structured = StructuredOutputs(json=schema)
    for number, bench in enumerate((byte_level, sentencepiece, byte_level)):
        walk = bench.walk(structured, seed + number)
        walk.run(60, is_long=number == 2)
        walk.complete()
        check_json(walk.output, schema)


@pytest.mark.parametrize("seed", range(NUM_REGEXES))
def test_finished_text_matches_and_cut_text_can_be_finished(
    seed: int, byte_level: Bench, sentencepiece: Bench
) -> None:
    pattern = random_regex(seed)
    structured = StructuredOutputs(regex=pattern)
    for bench in (byte_level, sentencepiece):
        walk = bench.walk(structured, seed)
        walk.run(12)
        walk.complete()
        assert re.fullmatch(pattern, walk.output.decode())


def test_every_prefix_can_be_finished(byte_level: Bench) -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "string", "minLength": 2},
            "b": {"type": "array", "items": {"enum": [1, 22]}},
        },
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    structured = StructuredOutputs(json=schema)
    whole = byte_level.walk(structured, 5)
    whole.run(40, is_long=True)
    for length in range(len(whole.token_ids)):
        walk = byte_level.walk(structured, length)
        for token_id in whole.token_ids[:length]:
            walk.allowed()
            walk.take(token_id)
        walk.complete()
        check_json(walk.output, schema)


def test_any_object_is_an_object(bench: Bench) -> None:
    for seed in range(20):
        walk = bench.walk(StructuredOutputs(json_object=True), seed)
        walk.run(50)
        walk.complete()
        assert isinstance(json.loads(walk.output.decode()), dict)


def test_every_choice_can_be_made_and_nothing_else(bench: Bench) -> None:
    choices = (
        "red",
        "redder",
        "the blue one",
        "</s>",
        'a "quoted" word',
        "back\\slash",
        "zwei\nZeilen",
        "été",
    )
    made = set()
    for seed in range(60):
        walk = bench.walk(StructuredOutputs(choice=choices), seed)
        walk.run(60)
        assert walk.is_over
        made.add(walk.output.decode())
    assert made <= set(choices)
    assert len(made) >= 6


def test_whitespace_between_parts_of_json_is_bounded(bench: Bench) -> None:
    structured = StructuredOutputs(json={"type": "array", "items": {"type": "null"}, "maxItems": 3})
    for seed in range(10):
        walk = bench.walk(structured, seed)
        for _ in range(200):
            if walk.is_over:
                break
            blanks = [
                i for i in walk.allowed().tolist() if not bench.tokenizer.token_bytes(i).strip(b" \n\t")
            ]
            blanks = [i for i in blanks if i not in bench.end_token_ids]
            if blanks:
                walk.take(walk.draw.choice(blanks))
            else:
                walk.step()
        walk.complete()
        assert max(map(len, re.findall(rb"\s+", walk.output)), default=0) <= 33


def test_a_whitespace_pattern_is_followed(bench: Bench) -> None:
    structured = StructuredOutputs(json={"const": {"a": [1, 2]}}, whitespace_pattern="\\n?")
    outputs = set()
    for seed in range(20):
        walk = bench.walk(structured, seed)
        walk.complete()
        outputs.add(walk.output.replace(b"\n", b""))
        assert b"\n\n" not in walk.output
    assert outputs == {b'{"a":[1,2]}'}
