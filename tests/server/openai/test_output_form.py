"""One wish for the output's form, under whichever of its names it comes."""

from __future__ import annotations

from typing import Any

import pytest

from graphllm.errors import InvalidRequestError
from graphllm.server.openai.completion_protocol import CompletionRequest
from graphllm.structured_outputs import StructuredOutputs
from tests.server.posting import Posted

SCHEMA = {"type": "object", "properties": {"a": {"enum": ["é"]}}}
SCHEMA_TEXT = '{"type":"object","properties":{"a":{"enum":["é"]}}}'


def form(**fields: Any) -> StructuredOutputs | None:
    return Posted("completions", **fields).params.structured_outputs


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": False}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": SCHEMA_TEXT}},
        {"guided_json": SCHEMA},
        {"guided_json": SCHEMA_TEXT},
        {"json_schema": SCHEMA_TEXT},
    ],
)
def test_a_schema_is_one_schema_under_all_its_names(fields: dict[str, Any]) -> None:
    assert form(**fields) == StructuredOutputs(json=SCHEMA_TEXT)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, StructuredOutputs(json_object=True)),
        ({"structured_outputs": {"json_object": True}}, StructuredOutputs(json_object=True)),
        ({"structured_outputs": {"regex": "a+"}}, StructuredOutputs(regex="a+")),
        ({"guided_regex": "a+"}, StructuredOutputs(regex="a+")),
        ({"regex": "a+"}, StructuredOutputs(regex="a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutputs(choice=("a", "b"))),
        ({"guided_choice": ["a", "b"]}, StructuredOutputs(choice=("a", "b"))),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, StructuredOutputs(grammar='start: "a"')),
        ({"guided_grammar": 'start: "a"'}, StructuredOutputs(grammar='start: "a"')),
        ({"ebnf": 'root ::= "a"'}, StructuredOutputs(grammar='root ::= "a"')),
    ],
)
def test_every_kind_of_form_has_its_names(fields: dict[str, Any], expected: StructuredOutputs | None) -> None:
    assert form(**fields) == expected


def test_text_is_no_form_and_goes_with_one() -> None:
    fields = {"response_format": {"type": "text"}, "guided_regex": "a"}
    assert form(**fields) == StructuredOutputs(regex="a")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "a", "regex": "a"}, "regex"),
        ({"response_format": {"type": "json_object"}, "guided_json": {}}, "guided_json"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}},
            "structured_outputs",
        ),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": ""}, "guided_json"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
    ],
)
def test_a_form_that_cannot_be_is_refused_by_its_own_name(fields: dict[str, Any], param: str) -> None:
    error = Posted("completions", **fields).error
    assert error["param"] == param and param.partition(".")[0] in error["message"]


def test_a_schema_that_is_nested_without_end_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"not": schema}
    request = CompletionRequest(model="m", prompt="x", guided_json=schema)
    with pytest.raises(InvalidRequestError) as caught:
        request.sampling_params()
    assert caught.value.param == "guided_json"
    while schema:  # taken apart by hand: the interpreter would do it by recursion
        schema = schema["not"]
