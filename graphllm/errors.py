"""Every error a user can meet, each with its HTTP status and its OpenAI error body.

Owns the mapping from a mistake to what the client sees. Does not log and does not know HTTP.
A user's mistake raises one of these; `assert` is for this project's own invariants.
"""

from __future__ import annotations

from typing import ClassVar


class GraphLLMError(Exception):
    """Base of all errors with a wire form.

    `param` names the request field at fault, `code` is OpenAI's machine-readable code.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code

    def body(self) -> dict[str, dict[str, str | None]]:
        """The OpenAI error object, ready for a JSON encoder."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class InvalidRequestError(GraphLLMError):
    """The request cannot be understood or asks for something out of range (400)."""

    status = 400
    type = "invalid_request_error"


class UnsupportedFieldError(InvalidRequestError):
    """A field of the OpenAI API that this engine does not honour (yet); never ignored (400)."""

    default_code = "unsupported_parameter"


class ContextLengthError(InvalidRequestError):
    """Prompt, or prompt and completion, longer than the model's context (400)."""

    default_code = "context_length_exceeded"


class AuthenticationError(GraphLLMError):
    """No API key, or a wrong one (401)."""

    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"


class NotFoundError(GraphLLMError):
    """No such route or object (404)."""

    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class ModelNotFoundError(NotFoundError):
    """The request names a model that is not served here (404)."""

    default_code = "model_not_found"


class MethodNotAllowedError(GraphLLMError):
    """The route exists, for another method (405)."""

    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"


class PayloadTooLargeError(GraphLLMError):
    """The request body is above the limit (413)."""

    status = 413
    type = "invalid_request_error"
    default_code = "payload_too_large"


class EngineUnavailableError(GraphLLMError):
    """The engine is loading, draining or has failed (503)."""

    status = 503
    type = "service_unavailable"
    default_code = "engine_unavailable"


class NoAllowedTokenError(InvalidRequestError):
    """What the request asks for leaves no token that may come next, in the midst of its answer (400)."""

    default_code = "no_allowed_token"


class ConstraintViolation(GraphLLMError):
    """A sampled token was not one that the request's constraint allows: a defect of ours (500)."""

    default_code = "constraint_violation"


class StepFailedError(GraphLLMError):
    """A device step that carried this request failed (500); other requests go on."""

    default_code = "step_failed"


class StartupError(GraphLLMError):
    """The process cannot start serving; the message says what to change. Never sent over HTTP."""


class ConfigError(StartupError):
    """A flag, or a combination of flags, that cannot work."""


class CheckpointError(StartupError):
    """A model's files are missing, truncated, inconsistent or not understood; names the file."""
