"""The fields that say what an answer must look like, in OpenAI's words and in those of other servers.

Owns `response_format`, `structured_outputs` and the older and shorter names for the same, and their
translation into one `StructuredOutputs`. Whether a schema can be enforced is found out where it is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from graphllm.errors import InvalidRequestError, UnsupportedFieldError
from graphllm.server.generation.served_model import ModelBody
from graphllm.structured_outputs import StructuredOutputs

JsonSchema = str | dict[str, Any] | bool


class JsonSchemaFormat(msgspec.Struct, forbid_unknown_fields=True):
    """`response_format.json_schema`. Schemas are enforced whether `strict` or not; the name is a label."""

    name: str | None = None
    schema: dict[str, Any] | bool | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    """type: "text", "json_object" or "json_schema"."""

    type: str
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputsFields(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's `structured_outputs`: exactly one of the first five."""

    json: JsonSchema | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None


class OutputFormFields(ModelBody, kw_only=True):
    """What the output must look like; at most one of these, `guided_whitespace_pattern` aside."""

    response_format: Annotated[
        ResponseFormat | None,
        Meta(description="text, json_object or json_schema; a schema is enforced, strict or not."),
    ] = None
    structured_outputs: Annotated[
        StructuredOutputsFields | None,
        Meta(description="The output follows a JSON schema, a regex, a choice of texts or a grammar."),
    ] = None
    guided_json: Annotated[JsonSchema | None, Meta(description="Older name of structured_outputs.json.")] = (
        None
    )
    guided_regex: Annotated[str | None, Meta(description="Older name of structured_outputs.regex.")] = None
    guided_choice: Annotated[
        list[str] | None, Meta(description="Older name of structured_outputs.choice.")
    ] = None
    guided_grammar: Annotated[str | None, Meta(description="Older name of structured_outputs.grammar.")] = (
        None
    )
    guided_whitespace_pattern: Annotated[
        str | None, Meta(description="A regex for the whitespace between the parts of guided_json's output.")
    ] = None
    regex: Annotated[str | None, Meta(description="The whole output matches this regex.")] = None
    ebnf: Annotated[str | None, Meta(description="The output follows this grammar, in EBNF or Lark.")] = None
    json_schema: Annotated[JsonSchema | None, Meta(description="The output is JSON of this schema.")] = None

    def output_form(self) -> tuple[str, StructuredOutputs] | None:
        """The field that asks for a form, and the form. Raises InvalidRequestError naming the field."""
        makers: dict[str, Callable[[], StructuredOutputs | None]] = {
            "response_format": self._from_response_format,
            "structured_outputs": self._from_structured_outputs,
            "guided_json": lambda: StructuredOutputs(
                json=_schema_text(self.guided_json), whitespace_pattern=self.guided_whitespace_pattern
            ),
            "guided_regex": lambda: StructuredOutputs(regex=self.guided_regex),
            "guided_choice": lambda: StructuredOutputs(choice=tuple(self.guided_choice or ())),
            "guided_grammar": lambda: StructuredOutputs(grammar=self.guided_grammar),
            "regex": lambda: StructuredOutputs(regex=self.regex),
            "ebnf": lambda: StructuredOutputs(grammar=self.ebnf),
            "json_schema": lambda: StructuredOutputs(json=_schema_text(self.json_schema)),
        }
        if self.guided_whitespace_pattern is not None and self.guided_json is None:
            raise InvalidRequestError(
                "'guided_whitespace_pattern' is only allowed with guided_json.",
                param="guided_whitespace_pattern",
            )
        found: tuple[str, StructuredOutputs] | None = None
        for name, make in makers.items():
            if getattr(self, name) is None:
                continue
            try:
                form = make()
            except InvalidRequestError as error:
                raise in_words_of(name, error) from None
            if form is not None and found is not None:
                raise InvalidRequestError(
                    f"'{found[0]}' and '{name}' both say what the output must look like; give one of them.",
                    param=name,
                )
            found = found if form is None else (name, form)
        return found

    def _from_response_format(self) -> StructuredOutputs | None:
        wanted = self.response_format
        assert wanted is not None
        if wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return StructuredOutputs(json_object=True)
        if wanted.type != "json_schema":
            raise UnsupportedFieldError(
                f"'response_format.type' must be text, json_object or json_schema, not {wanted.type[:40]!r}.",
                param="response_format.type",
            )
        if wanted.json_schema is None or wanted.json_schema.schema is None:
            raise InvalidRequestError(
                "Missing required field: 'response_format.json_schema.schema'.",
                param="response_format.json_schema.schema",
            )
        return StructuredOutputs(json=_schema_text(wanted.json_schema.schema))

    def _from_structured_outputs(self) -> StructuredOutputs:
        wanted = self.structured_outputs
        assert wanted is not None
        if wanted.disable_any_whitespace and wanted.whitespace_pattern is not None:
            raise InvalidRequestError(
                "'structured_outputs': whitespace_pattern and disable_any_whitespace exclude each other.",
                param="structured_outputs",
            )
        return StructuredOutputs(
            json=_schema_text(wanted.json),
            json_object=bool(wanted.json_object),
            regex=wanted.regex,
            choice=None if wanted.choice is None else tuple(wanted.choice),
            grammar=wanted.grammar,
            whitespace_pattern=" {0}" if wanted.disable_any_whitespace else wanted.whitespace_pattern,
            disable_additional_properties=wanted.disable_additional_properties,
        )


def in_words_of(name: str, error: InvalidRequestError) -> InvalidRequestError:
    """An error about `structured_outputs` in the words of the field that the client sent."""
    if error.param == "structured_outputs":
        error.param = name
        error.message = error.message.replace("structured_outputs", name, 1)
    return error


def _schema_text(schema: JsonSchema | None) -> str | None:
    """The schema as JSON text; one that comes as text already is taken as it is."""
    if schema is None or isinstance(schema, str):
        return schema
    try:
        return msgspec.json.encode(schema).decode()
    except RecursionError:
        raise InvalidRequestError(
            "structured_outputs: the schema is nested too deeply.", param="structured_outputs"
        ) from None
