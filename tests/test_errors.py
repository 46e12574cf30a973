"""Errors: each class's status and OpenAI body, which clients match on."""

from __future__ import annotations

import inspect
import json

import pytest

from graphllm import errors
from graphllm.errors import GraphLLMError, InvalidRequestError, ModelNotFoundError, StartupError

WIRE_FORMS = {
    "GraphLLMError": (500, "server_error", None),
    "InvalidRequestError": (400, "invalid_request_error", None),
    "UnsupportedFieldError": (400, "invalid_request_error", "unsupported_parameter"),
    "ContextLengthError": (400, "invalid_request_error", "context_length_exceeded"),
    "AuthenticationError": (401, "invalid_request_error", "invalid_api_key"),
    "NotFoundError": (404, "invalid_request_error", "not_found"),
    "ModelNotFoundError": (404, "invalid_request_error", "model_not_found"),
    "MethodNotAllowedError": (405, "invalid_request_error", "method_not_allowed"),
    "PayloadTooLargeError": (413, "invalid_request_error", "payload_too_large"),
    "EngineUnavailableError": (503, "service_unavailable", "engine_unavailable"),
    "NoAllowedTokenError": (400, "invalid_request_error", "no_allowed_token"),
    "ConstraintViolation": (500, "server_error", "constraint_violation"),
    "StepFailedError": (500, "server_error", "step_failed"),
}
# These end the process before there is anyone to send them to.
NEVER_SENT = {"StartupError", "ConfigError", "CheckpointError"}


def classes() -> dict[str, type[GraphLLMError]]:
    found = inspect.getmembers(errors, inspect.isclass)
    return {name: cls for name, cls in found if issubclass(cls, GraphLLMError)}


def test_every_error_has_a_wire_form_or_is_never_sent() -> None:
    assert set(classes()) == WIRE_FORMS.keys() | NEVER_SENT


@pytest.mark.parametrize(("name", "form"), WIRE_FORMS.items())
def test_wire_form(name: str, form: tuple[int, str, str | None]) -> None:
    status, type_, code = form
    error = classes()[name]("What is wrong.", param="field")
    assert error.status == status
    assert error.body() == {
        "error": {"message": "What is wrong.", "type": type_, "param": "field", "code": code}
    }
    assert json.loads(json.dumps(error.body())) == error.body()


@pytest.mark.parametrize("name", sorted(NEVER_SENT))
def test_what_is_never_sent_stops_the_start(name: str) -> None:
    assert issubclass(classes()[name], StartupError)


def test_a_given_code_replaces_the_default_for_that_error_only() -> None:
    assert ModelNotFoundError("x", code="gone").body()["error"]["code"] == "gone"
    assert ModelNotFoundError("x").body()["error"]["code"] == "model_not_found"


def test_str_is_the_message() -> None:
    assert str(InvalidRequestError("n must be positive.")) == "n must be positive."
